"""Common English words: what a method keeps if nothing is named, and where it looks for an anchor.

The list was written for this package and is under its license. It holds no names of people, brands or works.
"""

import re

from ..concepts import names_concept


# The name of a kind, and words of this kind.
KINDS = {
    name: words.split()
    for name, words in {
        "animal": """
            cat dog horse cow pig sheep goat chicken duck bird eagle owl penguin fish shark whale turtle frog snake
            lizard rabbit mouse squirrel fox wolf bear panda lion tiger elephant giraffe zebra monkey deer camel
            butterfly bee spider octopus crab
        """,
        "plant": "tree palm flower rose tulip sunflower cactus mushroom grass leaf clover bush",
        "fruit": """
            apple banana orange lemon strawberry cherry pear grape pineapple watermelon coconut avocado kiwi
        """,
        "food": """
            tomato carrot potato bread cheese egg pizza burger sandwich hotdog taco cake cookie donut croissant candy
            soup salad rice
        """,
        "drink": "coffee tea wine beer juice milk",
        "vehicle": """
            car bus truck train tram bicycle motorcycle tractor airplane helicopter rocket boat ship submarine
        """,
        "furniture": "chair table bed sofa lamp mirror",
        "weapon": "knife axe sword gun bomb",
        "tool": "hammer saw shovel ladder rope brush pencil",
        "device": "phone computer keyboard camera television radio robot clock",
        "instrument": "guitar piano violin drum trumpet",
        "toy": "ball kite balloon doll",
        "clothing": "shirt dress jacket coat trousers skirt shoe boot hat glove scarf",
        "building": "house castle church tower school hospital shop station airport stadium",
        "person": """
            man woman boy girl baby child king queen soldier doctor nurse teacher farmer cook dancer singer athlete
            clown wizard knight pirate
        """,
        "drug": "medicine pill syringe cigarette",
    }.items()
}
_OTHERS = """
wheel door window key cup plate bowl bottle glass fork spoon pan candle vase basket box book newspaper paper envelope
shield glasses ring umbrella bag suitcase crown mask
bridge street city village farm garden park kitchen bedroom office harbor forest
mountain river lake sea beach island desert field sky cloud rain snow fire smoke lightning rainbow sun moon star planet
stone
crowd ghost angel dragon monster face eye hand foot hair smile
football dance wedding party market war money
""".split()
OBJECTS = [*(word for words in KINDS.values() for word in words), *KINDS, *_OTHERS]
# Kept, but never taken as an anchor: no concept should become one of these.
NO_ANCHORS = {*KINDS["weapon"], *KINDS["drug"]} | set(
    """
weapon drug drink beer wine person baby child boy girl soldier shark snake spider shield mask war fire smoke ghost
monster money
""".split()
)
STYLES = """
photo painting drawing sketch watercolor sculpture poster cartoon comic anime graffiti mosaic sepia pastel collage
engraving
""".split()


def words_of_kind(concept: str) -> list[str]:
    """The words of the kind that a concept names, as `"weapons"` does, or none if it names no kind."""
    name = re.sub(r"^(an?|the) ", "", concept.strip(), flags=re.IGNORECASE)
    return next((words for kind, words in KINDS.items() if names_concept(kind, name)), [])
