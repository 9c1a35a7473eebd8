"""Common English words: what a method keeps when nothing is named, and where it looks for an anchor.

The list was written for this package and is under its license. It holds no names of people, brands or works.
"""

# By kind: animals, plants, food, vehicles, household, tools and devices, clothes, buildings and places, nature,
# people, activities and abstract things.
OBJECTS = """
cat dog horse cow pig sheep goat chicken duck bird eagle owl penguin fish shark whale turtle frog snake lizard
rabbit
mouse squirrel fox wolf bear panda lion tiger elephant giraffe zebra monkey deer camel butterfly bee spider octopus
crab
tree palm flower rose tulip sunflower cactus mushroom grass leaf clover forest bush
apple banana orange lemon strawberry cherry pear grape pineapple watermelon coconut avocado kiwi tomato carrot
potato
bread cheese egg pizza burger sandwich hotdog taco cake cookie donut croissant candy soup salad rice coffee tea
wine beer
juice milk
car bus truck train tram bicycle motorcycle tractor airplane helicopter rocket boat ship submarine wheel
chair table bed sofa lamp mirror clock door window key cup plate bowl bottle glass fork spoon pan candle vase
basket box
book newspaper pencil brush paper envelope
hammer saw knife axe sword gun bomb shield rope ladder shovel phone computer keyboard camera television radio robot
guitar piano violin drum trumpet ball kite balloon doll toy
shirt dress jacket coat trousers skirt shoe boot hat glove scarf glasses ring umbrella bag suitcase crown mask
house castle church tower bridge street city village farm garden park school hospital shop kitchen bedroom office
station airport harbor stadium
mountain river lake sea beach island desert field sky cloud rain snow fire smoke lightning rainbow sun moon star
planet
stone
man woman boy girl baby person child crowd king queen soldier doctor nurse teacher farmer cook dancer singer
athlete
clown wizard knight pirate ghost angel dragon monster
face eye hand foot hair smile
football dance wedding party market war medicine pill syringe cigarette money
""".split()
# Kept, but never taken as an anchor: no concept should become one of these.
NO_ANCHORS = set(
    """
shark snake spider knife axe sword gun bomb soldier war fire smoke ghost monster mask medicine pill syringe cigarette
money beer wine baby child boy girl
""".split()
)
STYLES = """
photo painting drawing sketch watercolor sculpture poster cartoon comic anime graffiti mosaic sepia pastel collage
engraving
""".split()
