"""A family is one file: outside `families/` no identifier and no string names an architecture."""

import io
import re
import tokenize
from pathlib import Path

import diffusers_safe


SOURCE = Path(diffusers_safe.__file__).parent
# `transformers` is the library.
ARCHITECTURE = re.compile(r"unet|transformer(?!s)|attn", re.IGNORECASE)
# The embedded models are built there: they are architectures.
FREE = ("families", "emoji")
# How many names are left, and why. It can only shrink: who removes one lowers the number.
_VOCABULARY = "a train method's name, which users write"
LEFT = {
    "methods/concept_ablation.py": (1, _VOCABULARY),
    "methods/esd.py": (2, _VOCABULARY),
    "training/options.py": (1, _VOCABULARY),
}


def names_in(path):
    """The identifiers and strings of a file that name an architecture; comments may."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokens:
        if token.type in kinds:
            yield from ((token.start[0], found[0]) for found in ARCHITECTURE.finditer(token.string))


def test_the_search_finds_what_it_looks_for(tmp_path):
    (tmp_path / "a.py").write_text(
        'import transformers\nmodel = pipeline.unet  # unet\nname = f"x{model}.attn2"\nTransformer2D = 1\n'
    )
    assert list(names_in(tmp_path / "a.py")) == [(2, "unet"), (3, "attn"), (4, "Transformer")]
    assert any(names_in(SOURCE / "families" / "unet.py"))


def test_no_architecture_is_named_outside_the_families():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.parts[0] not in FREE and (names := list(names_in(path))):
            found[place.as_posix()] = names
    counts = {place: len(names) for place, names in found.items()}
    assert counts == {place: count for place, (count, _) in LEFT.items()}, found
