"""Make the results that the gallery draws: ``python docs/gallery/make.py`` all, or those that are named.

Each file comes from the lines that its page shows; SmolLM2 and a few minutes on two cores are needed for all.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "_ext"))

import gallery  # noqa: E402

import tvlens as tv  # noqa: E402


def make(entry: gallery.Entry) -> tv.Result:
    """Run the lines that make an entry's data."""
    scope = {"tv": tv}
    exec(compile(entry.paragraphs[0], f"{entry.data}.nc", "exec"), scope)
    return scope["result"]


def main(wanted: list[str]) -> None:
    """Make files, all or some."""
    made = {}
    for page in sorted(HERE.glob("*.md")):
        for entry in gallery.entries(page):
            if entry.data and entry.paragraphs[0]:
                if entry.data in made:
                    raise SystemExit(
                        f"{entry.data}.nc is made twice, the second time in {page.name}"
                    )
                made[entry.data] = entry
    if unknown := set(wanted) - set(made):
        raise SystemExit(f"no page makes {', '.join(sorted(unknown))}; known: {', '.join(made)}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # sweeps leave their cells where they run
        for name in wanted or made:
            started = time.process_time()
            path = make(made[name]).save(made[name].path)
            seconds = time.process_time() - started
            size = path.stat().st_size / 1000
            sys.stdout.write(f"{name}: {size:.0f} kB, {seconds:.0f} s of processor time\n")
            sys.stdout.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens says that it will change
    main(sys.argv[1:])
