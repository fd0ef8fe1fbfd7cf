"""The vocabulary of the embedded cascade: which emoji it learns by name, how they are called, what is left out.

A concept is an emojibase label. `BASE_LABELS` are the concepts with captions that Stage C and CLIP memorise; they were
chosen to be concrete, well known and easy to tell apart at 64 px. Everything else only teaches shapes and colours to
Stage A, the image encoder and Stage B.
"""

BASE_LABELS = (
    # faces
    "grinning face", "smiling face with heart-eyes", "smiling face with sunglasses", "skull", "ghost", "alien",
    "robot",
    # hearts
    "red heart", "orange heart", "yellow heart", "green heart", "blue heart", "purple heart", "broken heart",
    # animals
    "monkey face", "dog face", "fox", "cat face", "lion", "tiger face", "horse face", "unicorn", "cow face",
    "pig face", "mouse face", "rabbit face", "bear", "koala", "panda", "elephant", "giraffe", "bat", "baby chick",
    "penguin", "owl", "flamingo", "parrot", "frog", "turtle", "snake", "T-Rex", "spouting whale", "dolphin",
    "tropical fish", "octopus", "crab", "snail", "butterfly", "honeybee", "lady beetle", "spider", "paw prints",
    # plants
    "cherry blossom", "rose", "sunflower", "tulip", "evergreen tree", "deciduous tree", "palm tree", "cactus",
    "four leaf clover", "maple leaf", "mushroom",
    # fruit and vegetables
    "grapes", "watermelon", "tangerine", "lemon", "banana", "pineapple", "red apple", "green apple", "pear",
    "peach", "cherries", "strawberry", "tomato", "avocado", "eggplant", "carrot", "ear of corn", "broccoli",
    # food and drink
    "bread", "croissant", "pretzel", "cheese wedge", "hamburger", "french fries", "pizza", "hot dog", "cooking",
    "popcorn", "soft ice cream", "doughnut", "cookie", "birthday cake", "lollipop", "candy", "hot beverage",
    "wine glass", "beer mug",
    # places and vehicles
    "volcano", "house", "castle", "tent", "globe showing Americas", "locomotive", "bus", "ambulance", "taxi",
    "automobile", "tractor", "bicycle", "sailboat", "airplane", "helicopter", "rocket", "flying saucer",
    "vertical traffic light", "stop sign", "anchor",
    # sky
    "crescent moon", "full moon", "sun", "ringed planet", "star", "cloud", "rainbow", "umbrella", "high voltage",
    "snowflake", "snowman without snow", "fire", "droplet",
    # things
    "jack-o-lantern", "Christmas tree", "balloon", "wrapped gift", "trophy", "soccer ball", "basketball", "tennis",
    "bullseye", "pool 8 ball", "teddy bear", "artist palette", "glasses", "t-shirt", "jeans", "crown", "top hat",
    "gem stone", "bell", "headphone", "guitar", "drum", "musical note", "laptop", "television", "camera", "candle",
    "light bulb", "closed book", "envelope", "pencil", "scissors", "locked", "key", "hammer", "bomb", "magnet",
    "alarm clock", "door",
)  # fmt: skip

# A shorter everyday name where the Unicode label is a description, and a longer one where that would be taken.
SHORT_NAMES = {
    "automobile": "car",
    "closed book": "red book",
    "deciduous tree": "tree",
    "ear of corn": "corn",
    "globe showing Americas": "globe",
    "high voltage": "lightning bolt",
    "hot beverage": "coffee cup",
    "lady beetle": "ladybug",
    "ice cream": "bowl of ice cream",
    "locked": "padlock",
    "pool 8 ball": "8 ball",
    "smiling face with heart-eyes": "face with heart eyes",
    "smiling face with sunglasses": "face with sunglasses",
    "snowman": "snowman in snow",
    "snowman without snow": "snowman",
    "soft ice cream": "ice cream",
    "spouting whale": "whale",
    "tennis": "tennis ball",
    "vertical traffic light": "traffic light",
    "whale": "big whale",
}

# The quickstart's LoRA learns the ink style from these; the other base concepts show whether the style carries over.
INK_LABELS = (
    "skull", "ghost", "robot", "broken heart", "fox", "lion", "tiger face", "unicorn", "pig face", "rabbit face",
    "bear", "elephant", "bat", "penguin", "flamingo", "frog", "snake", "T-Rex", "dolphin", "octopus", "butterfly",
    "honeybee", "spider", "cherry blossom", "sunflower", "evergreen tree", "palm tree", "four leaf clover",
    "grapes", "watermelon", "lemon", "pineapple", "red apple", "cherries", "eggplant", "carrot", "croissant",
    "cheese wedge", "french fries", "doughnut", "birthday cake", "wine glass", "volcano", "castle", "bus",
    "bicycle", "airplane", "rocket", "stop sign", "ringed planet", "umbrella", "snowflake", "wrapped gift",
    "soccer ball", "crown", "bell", "guitar", "camera", "scissors", "bomb",
)  # fmt: skip

# emojibase groups: 0 faces, 1 people, 2 components, 3 animals, 4 food, 5 travel, 6 activities, 7 objects, 8 symbols,
# 9 flags.
WIDE_GROUPS = (0, 3, 4, 5, 6, 7)
HELD_OUT_GROUPS = (3, 4, 5, 6, 7)
WIDE_SYMBOL_SUBGROUPS = ("geometric",)
# Images of people, and clock faces, which differ by one hand only.
SKIPPED_LABELS = ("wedding", "Japanese dolls", "Statue of Liberty", "nesting dolls", "joker", "moai")
SKIPPED_ENDINGS = ("o’clock", "-thirty")

WHITE = ("white", (255, 255, 255))
BACKGROUNDS = (
    ("light blue", (184, 224, 255)),
    ("blue", (92, 150, 245)),
    ("pink", (255, 192, 218)),
    ("red", (240, 100, 100)),
    ("light green", (196, 240, 186)),
    ("mint", (160, 235, 215)),
    ("yellow", (255, 232, 120)),
    ("orange", (255, 190, 110)),
    ("lavender", (216, 200, 250)),
    ("gray", (205, 205, 205)),
)


def caption_name(label: str) -> str:
    """The lower-case name that captions use for an emojibase label."""
    return SHORT_NAMES.get(label, label).lower().replace("’", "'")
