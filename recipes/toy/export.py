"""Put what a training wrote where tvlens finds it: ``python -m recipes.toy.export DIR 0 200 1000 ...``."""

import argparse
import json
import shutil
from pathlib import Path

from recipes.toy.tables import PATH
from recipes.toy.words import build_tokenizer

LIMIT = 12_000_000  # bytes of weights that the wheel carries at most


def main(arguments: list[str] | None = None) -> None:
    """Copy checkpoints and configuration, and write the tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m recipes.toy.export")
    parser.add_argument("source", type=Path, help="what --out of the training was")
    parser.add_argument("steps", type=int, nargs="+", help="checkpoints, the last one the model")
    args = parser.parse_args(arguments)
    wanted = [args.source / f"step_{step}.safetensors" for step in args.steps]
    size = sum(path.stat().st_size for path in wanted)
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes of weights, where {LIMIT:,} are allowed: fewer steps.")
    for old in PATH.parent.glob("step_*.safetensors"):
        old.unlink()
    for path in (*wanted, args.source / "config.json"):
        shutil.copyfile(path, PATH.parent / path.name)
    vocabulary = json.loads(PATH.read_text(encoding="utf-8"))["vocabulary"]
    build_tokenizer(vocabulary).save(str(PATH.parent / "tokenizer.json"))


if __name__ == "__main__":
    main()
