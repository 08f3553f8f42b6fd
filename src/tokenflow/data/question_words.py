"""Words to ask with: what captions call things, plain names of classes, groups of classes.

Made by hand for the captions of Flickr8k, the 200 classes of Tiny-ImageNet and the flowers of Oxford 102. The
tables are data: a set with other classes is asked about by its class names alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """Something to look for.

    Attributes:
        phrase: how a question calls it, with its article.
        forms: words of a caption that say it is there.
        unclear: words that leave it open. A caption need not name everything; with one of these in any
            caption and none of `forms`, nothing is asked.
    """

    phrase: str
    forms: frozenset[str]
    unclear: frozenset[str] = frozenset()


def _words(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


_MEN = "man men guy guys gentleman gentlemen father dad groom grandfather"
_WOMEN = "woman women lady ladies mother mom bride grandmother"
_BOYS = "boy boys son brother"
_GIRLS = "girl girls daughter sister"
_CHILDREN = f"child children kid kids toddler toddlers baby babies infant {_BOYS} {_GIRLS}"
_SOMEBODY = """person people adult adults couple crowd crowds group family friend friends someone somebody
    human teen teens teenager teenagers student students player players team teams audience spectators
    onlookers bystanders passengers pedestrian pedestrians tourists worker workers officer officers police
    soldier soldiers photographer performer performers band musician musicians singer guitarist drummer
    dancer dancers cheerleader cheerleaders runner runners jogger racer racers rider riders biker bikers
    cyclist cyclists bicyclist bicyclists bicycler motorcyclist motorcyclists skateboarder skateboarders
    skater skaters rollerblader snowboarder snowboarders skier skiers surfer surfers windsurfer
    wakeboarder waterskier kayaker kayakers rower climber climbers hiker hikers backpacker mountaineer
    swimmer swimmers diver wrestler wrestlers boxer footballer footballers goalie batter pitcher catcher
    referee driver owner trainer jockey cowboy clown artist artists vendor male males female females hand
    hands arm arms face"""
_DOGS = """dog dogs doggy puppy puppies pup retriever retrievers terrier terriers greyhound greyhounds
    collie poodle dalmatian rottweiler hound hounds labrador labradors dachshund pug corgi chihuahua
    beagle husky mutt canine doberman"""
_CATS = "cat cats kitten kittens"
_HORSES = "horse horses pony ponies"
_BIRDS = """bird birds duck ducks goose geese seagull seagulls pigeon pigeons swan swans owl eagle parrot
    chicken chickens flamingo flamingos pelican hawk falcon"""
_COWS = "cow cows bull bulls cattle calf"
_ANIMALS = f"""{_DOGS} {_CATS} {_HORSES} {_BIRDS} {_COWS} animal animals sheep goat goats elephant
    elephants camel camels monkey monkeys bear deer fish rabbit tiger lion llama zebra squirrel turtle
    lizard butterfly donkey"""
_MOTORCYCLES = "motorcycle motorcycles motorbike motorbikes motorcyclist motorcyclists motocross dirtbike"
_BIKES = f"""bike bikes bicycle bicycles biker bikers biking bicyclist bicyclists bicycler cyclist
    cyclists bmx {_MOTORCYCLES}"""
_VEHICLES = "vehicle vehicles car cars truck trucks van bus buses jeep taxi traffic racer racing race driver"
_BALL_GAMES = """soccer football basketball baseball tennis volleyball rugby softball golf hockey lacrosse
    cricket polo"""
_WATER = """water waters ocean sea lake river pool pond stream creek wave waves surf surfing surfer
    surfers swimming swim swims swimmer boat boats canoe kayak raft waterfall rapids wading underwater"""
_SNOW = """snow snowy snowball snowman snowboard snowboarder snowboarders snowboarding skier skiers skiing
    ski skis sled sleds sledding"""
_BOATS = """boat boats canoe canoes kayak kayaks kayaker kayakers kayaking raft rafting sailboat sailboats
    ship rowboat ferry motorboat"""
_GAME = "game team teams player players match playing plays play ball field court"

# What the questions about captions look for. Broad things come before what they include.
THINGS = tuple(
    Thing(phrase, _words(forms), _words(unclear))
    for phrase, forms, unclear in (
        ("a person", f"{_SOMEBODY} {_MEN} {_WOMEN} {_CHILDREN}", ""),
        ("an animal", _ANIMALS, "mule shepherd lab"),
        (
            "water",
            _WATER,
            "puddle wet beach rain fountain splash splashes splashing sprinkler hose bath shore",
        ),
        ("snow", _SNOW, "ice icy winter mountain mountains"),
        ("a bike", _BIKES, "rider riders ride rides riding racer racers wheels trick"),
        ("a child", _CHILDREN, f"{_SOMEBODY} young"),
        (
            "a crowd",
            "crowd crowds crowded audience spectators onlookers",
            "people group many parade team race",
        ),
        ("a man", _MEN, f"{_SOMEBODY} {_BOYS}"),
        ("a woman", _WOMEN, f"{_SOMEBODY} {_GIRLS}"),
        ("a boy", _BOYS, f"{_SOMEBODY} {_MEN} child children kid kids toddler baby young"),
        ("a girl", _GIRLS, f"{_SOMEBODY} {_WOMEN} child children kid kids toddler baby young"),
        ("a dog", _DOGS, "animal animals shepherd lab"),
        ("a cat", _CATS, "animal animals"),
        ("a horse", _HORSES, "animal animals equestrian rodeo jockey polo carriage bull"),
        ("a bird", _BIRDS, "animal animals wings"),
        ("a cow", _COWS, "animal animals rodeo"),
        ("a motorcycle", _MOTORCYCLES, "bike bikes biker bikers rider riders racer vehicle"),
        ("a car", "car cars taxi cab jeep racecar", f"{_VEHICLES} street road city parking"),
        ("a bus", "bus buses", "vehicle vehicles street city"),
        ("a truck", "truck trucks", "vehicle vehicles van street road"),
        ("a boat", _BOATS, "paddle paddling rowing oars sail dock vessel"),
        ("a train", "train trains", "station subway railroad tracks"),
        (
            "a skateboard",
            "skateboard skateboards skateboarder skateboarders skateboarding",
            "skate skates skater skaters skating ramp board trick",
        ),
        (
            "a surfboard",
            "surfboard surfboards surfer surfers surfing surfs windsurfer",
            "board surf wave waves",
        ),
        ("a ball", "ball balls basketballs", f"{_BALL_GAMES} game toy catch"),
        ("a frisbee", "frisbee frisbees", "disc disk toy catch"),
        ("a guitar", "guitar guitars guitarist", "band music instrument instruments musician musicians"),
        (
            "a hat",
            "hat hats cap caps beanie sombrero",
            f"helmet helmets hood headgear bandanna uniform uniforms winter costume {_SNOW}",
        ),
        (
            "a helmet",
            "helmet helmets",
            f"{_BIKES} {_SNOW} {_BALL_GAMES} {_BOATS} racer rider race climber skateboard "
            "skateboarder skater hat gear uniform",
        ),
        ("*sunglasses", "sunglasses shades", "glasses goggles"),
        ("a swimming pool", "pool pools", "swimming swim swims swimmer water"),
        ("a beach", "beach beaches", "sand sandy ocean shore sea water wave waves coast lake surfer"),
        (
            "a mountain",
            "mountain mountains mountainside mountaintop",
            "hill hills hillside rock rocks cliff landscape slope peak summit climber climbing hiker",
        ),
        ("*flowers", "flower flowers", "garden plants plant flowered"),
        ("a bench", "bench benches", "seat sitting sits park"),
        ("a tent", "tent tents", "camp camping canopy"),
        ("a backpack", "backpack backpacks backpacker", "bag bags pack hiker hikers hiking"),
        ("an umbrella", "umbrella umbrellas", "parasol rain beach"),
        ("a stick", "stick sticks", "branch log pole wood"),
        ("a soccer game", "soccer", f"football {_GAME}"),
        ("a football game", "football", f"soccer rugby {_GAME}"),
        ("a tennis player", "tennis", f"racket racquet {_GAME}"),
        ("a basketball game", "basketball", f"hoop {_GAME}"),
        ("a baseball game", "baseball", f"bat softball pitcher batter {_GAME}"),
    )
)

# Colours as captions call them, and as questions do.
COLORS = {
    **{color: color for color in ("black", "white", "brown", "red", "blue", "green", "yellow", "orange")},
    **{color: color for color in ("pink", "purple", "gray")},
    "grey": "gray",
    "tan": "brown",
}
# Things that have a colour worth asking for: as asked, and as captions call them.
COLORED = {
    **{noun: _words(noun) for noun in ("dog", "horse", "jacket", "dress", "hat", "coat", "sweater", "vest")},
    **{noun: _words(noun) for noun in ("swimsuit", "uniform", "helmet", "ball", "car", "boat", "truck")},
    "shirt": _words("shirt tshirt"),
    "bike": _words("bike bicycle motorcycle"),
}
# What is worth counting: plural as asked, and the forms of one and of many.
COUNTED = {
    "dogs": ("dog", "dogs"),
    "men": ("man", "men"),
    "women": ("woman", "women"),
    "boys": ("boy", "boys"),
    "girls": ("girl", "girls"),
    "children": ("child", "children"),
    "horses": ("horse", "horses"),
}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}

# Class names that need a plainer word than the first of their synonyms.
PLAIN_NAMES = {
    "tabby": "tabby cat",
    "monarch": "monarch butterfly",
    "bighorn": "bighorn sheep",
    "black widow": "black widow spider",
    "lesser panda": "red panda",
    "hog": "pig",
    "organ": "pipe organ",
    "teddy": "teddy bear",
    "brass": "brass plaque",
    "jinrikisha": "rickshaw",
    "ice lolly": "popsicle",
    "alp": "mountain",
    "beach wagon": "station wagon",
    "beacon": "lighthouse",
    "gasmask": "gas mask",
    "nail": "metal nail",
    "crane": "construction crane",
    "thatch": "thatched roof",
    "magnetic compass": "compass",
    "pay-phone": "pay phone",
    "confectionery": "candy store",
    "walking stick": "stick insect",
    "lotus lotus": "lotus",
}
# Names without an article.
PLURAL_NAMES = _words("binoculars sunglasses") | {
    "swimming trunks",
    "canterbury bells",
    "prince of wales feathers",
}
MASS_NAMES = _words("guacamole espresso") | {"ice cream", "mashed potato", "love in the mist", "bee balm"}


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in " ".join(text.split()).split(","))


_LEAVES = {
    "dog": """Chihuahua, Yorkshire terrier, golden retriever, Labrador retriever, German shepherd,
        standard poodle""",
    "cat": "tabby, Persian cat, Egyptian cat",
    "wild cat": "cougar, lion",
    "bird": "goose, black stork, king penguin, albatross",
    "insect": """ladybug, fly, bee, grasshopper, walking stick, cockroach, mantis, dragonfly, monarch,
        sulphur butterfly""",
    "spider": "black widow, tarantula",
    "bug": "scorpion, centipede",
    "reptile": "American alligator, boa constrictor",
    "frog": "bullfrog, tailed frog",
    "monkey": "orangutan, chimpanzee, baboon",
    "hoofed": "hog, ox, bison, bighorn, gazelle, Arabian camel",
    "sea": "goldfish, jellyfish, sea slug, American lobster, spiny lobster, dugong, sea cucumber",
    "other animal": """European fire salamander, snail, slug, koala, brown bear, guinea pig, African
        elephant, lesser panda""",
    "odd animal": "trilobite, brain coral",
    "car": "beach wagon, convertible, limousine, sports car, police van",
    "boat": "gondola, lifeboat",
    "other vehicle": """bullet train, freight car, go-kart, jinrikisha, moving van, school bus, tractor,
        trolleybus""",
    "odd vehicle": "lawn mower, crane",
    "bridge": "steel arch bridge, suspension bridge, viaduct",
    "building": "barn, beacon, cliff dwelling, water tower, thatch, birdhouse",
    "structure": """dam, fountain, obelisk, triumphal arch, flagpole, maypole, pole, picket fence,
        bannister, turnstile""",
    "indoor place": "altar, barbershop, butcher shop, confectionery",
    "furniture": "chest, desk, dining table, rocking chair",
    "odd furniture": "refrigerator, bathtub, lampshade, organ",
    "clothing": """academic gown, apron, bikini, bow tie, cardigan, fur coat, kimono, military uniform,
        miniskirt, poncho, sandal, sock, sombrero, swimming trunks, vestment""",
    "odd clothing": "Christmas stocking, sunglasses, gasmask, neck brace, backpack, snorkel, umbrella",
    "fruit": "orange, lemon, banana, pomegranate",
    "vegetable": "cauliflower, bell pepper",
    "other food": "guacamole, ice cream, ice lolly, pretzel, mashed potato, meat loaf, pizza, potpie",
    "odd food": "mushroom, espresso, plate, acorn, wooden spoon, wok, frying pan, beer bottle, pop bottle",
    "ball": "basketball, rugby ball, volleyball",
    "bottle": "beer bottle, pop bottle, pill bottle",
    "odd bottle": "water jug, beaker, syringe",
    "kitchen thing": "frying pan, wok, wooden spoon, teapot, water jug",
    "odd kitchen": """plate, refrigerator, beaker, beer bottle, pop bottle, espresso, barrel, bucket,
        dining table""",
    "machine": """cash machine, CD player, computer keyboard, iPod, pay-phone, remote control, sewing
        machine, space heater, refrigerator""",
    "odd machine": """parking meter, stopwatch, magnetic compass, lawn mower, scoreboard, crane, torch,
        lampshade""",
    "landscape": "alp, cliff, coral reef, lakeside, seashore",
    "odd landscape": """cliff dwelling, dam, viaduct, brain coral, fountain, barn, beacon, steel arch
        bridge, suspension bridge""",
    "flower": """alpine sea holly, anthurium, artichoke, azalea, ball moss, balloon flower, barbeton
        daisy, bearded iris, bee balm, bird of paradise, bishop of llandaff, black-eyed susan, blackberry
        lily, blanket flower, bolero deep blue, bougainvillea, bromelia, buttercup, californian poppy,
        camellia, canna lily, canterbury bells, cape flower, carnation, cautleya spicata, clematis, colt's
        foot, columbine, common dandelion, corn poppy, cyclamen, daffodil, desert-rose, english marigold,
        fire lily, foxglove, frangipani, fritillary, garden phlox, gaura, gazania, geranium, giant white
        arum lily, globe thistle, globe-flower, grape hyacinth, great masterwort, hard-leaved pocket
        orchid, hibiscus, hippeastrum, japanese anemone, king protea, lenten rose, lotus, lotus lotus,
        love in the mist, magnolia, mallow, marigold, mexican aster, mexican petunia, monkshood, moon
        orchid, morning glory, orange dahlia, osteospermum, oxeye daisy, passion flower, pelargonium,
        peruvian lily, petunia, pincushion flower, pink primrose, pink-yellow dahlia, poinsettia, primula,
        prince of wales feathers, purple coneflower, red ginger, rose, ruby-lipped cattleya, siam tulip,
        silverbush, snapdragon, spear thistle, spring crocus, stemless gentian, sunflower, sweet pea,
        sweet william, sword lily, thorn apple, tiger lily, toad lily, tree mallow, tree poppy, trumpet
        creeper, wallflower, water lily, watercress, wild pansy, windflower, yellow iris""",
}


def _union(*leaves: str) -> frozenset[str]:
    return frozenset().union(*(_names(_LEAVES[leaf]) for leaf in leaves))


_BUGS = ("insect", "spider", "bug")
_ANIMAL_LEAVES = (
    "dog",
    "cat",
    "wild cat",
    "bird",
    *_BUGS,
    "reptile",
    "frog",
    "monkey",
    "hoofed",
    "sea",
    "other animal",
)
_VEHICLE_LEAVES = ("car", "boat", "other vehicle")
_FOOD_LEAVES = ("fruit", "vegetable", "other food")

# Groups of classes: how a question calls one, its members, and classes for which the answer is debatable.
GROUPS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "an animal": (_union(*_ANIMAL_LEAVES), _union("odd animal") | {"teddy", "coral reef"}),
    "a vehicle": (_union(*_VEHICLE_LEAVES), _union("odd vehicle")),
    "a flower": (_union("flower"), _union("vegetable")),
    "food": (_union(*_FOOD_LEAVES), _union("odd food") | {"butcher shop", "confectionery", "dining table"}),
    "a piece of clothing": (_union("clothing"), _union("odd clothing")),
    "a building": (_union("building"), _union("bridge", "structure", "indoor place", "landscape")),
    "a landscape": (_union("landscape"), _union("odd landscape", "structure", "building")),
    "a dog": (_union("dog"), frozenset()),
    "a cat": (_union("cat"), _union("wild cat")),
    "a bird": (_union("bird"), frozenset({"birdhouse"})),
    "an insect": (_union("insect"), _union("spider", "bug") | {"spider web"}),
    "a monkey or an ape": (_union("monkey"), frozenset()),
    "a reptile": (_union("reptile"), _union("frog") | {"European fire salamander"}),
    "a sea animal": (_union("sea"), _union("odd animal") | {"coral reef", "king penguin", "albatross"}),
    "a spider": (_union("spider"), frozenset({"spider web", "scorpion"})),
    "a car": (_union("car"), frozenset({"moving van", "go-kart", "parking meter"})),
    "a boat": (_union("boat"), frozenset({"lakeside", "seashore", "snorkel"})),
    "a bridge": (_union("bridge"), frozenset({"dam", "triumphal arch"})),
    "a fruit": (_union("fruit"), _union("vegetable") | {"acorn", "ice lolly"}),
    "a piece of furniture": (_union("furniture"), _union("odd furniture")),
    "a ball": (_union("ball"), frozenset({"punching bag"})),
    "a bottle": (_union("bottle"), _union("odd bottle")),
    "a kitchen utensil": (_union("kitchen thing"), _union("odd kitchen")),
    "an electrical device": (_union("machine"), _union("odd machine")),
}
# Groups that exclude each other, for "is it this or that?".
APART = ("an animal", "a vehicle", "a flower", "food", "a piece of clothing", "a building", "a landscape")
