"""Random English prompts for training, each with the look that it asks for, and HELD_OUT prompts for evaluation.

If a prompt names several looks, night wins over snow and snow over sunset ("a snowy night" is night). A prompt that
names none is day.
"""

from __future__ import annotations

import numpy as np

DAY, SUNSET, NIGHT, SNOW = range(4)


def _split(text: str) -> list[str]:
    return text.split("; ")


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = {
    DAY: _split("sunny; bright; clear; fair; sunlit; summer; spring; midday; daytime; morning; pleasant"),
    SUNSET: _split("sunset; dusky; golden-hour; evening; twilight; orange-lit; sundown; late-evening; dusk"),
    NIGHT: _split("moonlit; nighttime; starlit; nocturnal; midnight; dark; starry; night; lamplit"),
    SNOW: _split("snowy; wintry; snow-covered; frozen; frosty; winter; icy; white winter; snowbound"),
}
_PHRASES = {
    DAY: _split(
        "by day; at noon; on a sunny day; on a bright day; under a blue sky; in the morning; in summer; in broad "
        "daylight; in the sunshine; on a clear day; in spring; with white clouds; in the afternoon; in warm "
        "sunlight"
    ),
    SUNSET: _split(
        "at sunset; at dusk; in the evening; at sundown; in the golden hour; at twilight; at nightfall; in the "
        "evening glow; under an orange sky; as the sun goes down; with a low orange sun; at dawn; with a pink and "
        "orange sky; in the last light of the day; at sunrise; while the sun is setting; in warm evening light; "
        "with long shadows of the evening"
    ),
    NIGHT: _split(
        "at night; by night; at midnight; under the stars; in the moonlight; after dark; in the dark; under a "
        "starry sky; under the moon; late at night; with glowing windows at night; under a full moon; with a dark "
        "sky full of stars; in the middle of the night; with lamps glowing in the dark"
    ),
    SNOW: _split(
        "in winter; in the snow; under snow; covered in snow; after a snowfall; on a snowy day; in frost; with "
        "snow on the roofs; buried in snow; in a white winter; with fresh snow on the ground; in january; in the "
        "cold of winter; while snow is falling; at christmas; under a blanket of snow; in a blizzard"
    ),
}
_STANDALONE = {
    DAY: _split("day; daylight; noon; sunshine; a sunny day; blue sky; make it day again; morning; let the sun shine"),
    SUNSET: _split(
        "sunset; dusk; evening; golden hour; twilight; the sun goes down; make it sunset; evening falls; sunset "
        "over the {place}; the sun sets behind the {place}; dusk falls over the {place}; sunrise; the sky turns "
        "orange over the {place}; an orange evening sky"
    ),
    NIGHT: _split(
        "night; midnight; moonlight; stars; night falls; make it night; it gets dark; a starry night; night over "
        "the {place}; the moon over the {place}; stars above the {place}; darkness; a dark night; night falls "
        "over the {place}; the moon rises; it is dark; a dark sky; dark; a dark sky with stars; a dark street"
    ),
    SNOW: _split(
        "snow; winter; frost; it snows; make it snow; winter comes; snow everywhere; snowfall; snow falls on the "
        "{place}; the {place} lies under snow; winter in the {place}; ice and snow; let it snow; everything is "
        "white with snow"
    ),
}
_PLACES = _split(
    "village; plaza; town; park; garden; square; meadow; island; world; little world; valley; town square; "
    "landscape; place; street; path; lighthouse; windmill; pond; harbor; countryside; castle; lawn; market; lake; "
    "hills; house; fountain; pavilion; toy village; playground; forest"
)
_OBJECTS = _split(
    "a lighthouse; a red gate; a windmill; a hot-air balloon; a giant mushroom; cherry trees; pine trees; a "
    "fountain; a house with a red roof; a teal dome; a small castle; street lamps; a pond; winding paths; a "
    "striped balloon; green hills; a stone tower; a pavilion; a wooden bridge; flowers; people walking"
)
_MISLEADING = _split(
    "ice cream; an ice cream cone; ice cubes in a glass; iced tea; dark chocolate; a dark green door; a dark blue car; "
    "dark red bricks; a dark wood table; dark hair; a frozen pizza; frozen food; a film star; a starfish; a star on a "
    "flag; a winter coat; an evening dress; a moon cake; a frosted cake; a lamp shade"
)
"""Things whose words belong to a look and do not ask for it."""

_JOINTS = _words("with and beside sells near eats or")

_OPENINGS = [""] * 3 + [
    f"{text} "
    for text in _split(
        "a photo of; a view of; a painting of; walking through; a walk through; exploring; pixel art of; first-person "
        "view of; a low-poly view of; we walk across; a game world:; a video of; standing in; show me"
    )
]
_ENDINGS = [""] * 3 + _split(
    ". Steady camera at eye height; , high detail; , cinematic; , soft colours; , stylised; . Wide angle; , calm "
    "and quiet; , peaceful; . A gentle breeze; , low poly; , toy-like; , 4k; . No people"
)
_UNRELATED = _words(
    "robot banana guitar teacher ocean rocket library dragon coffee pizza horse train desert jungle city street "
    "car dancing sleeping running blue green yellow purple tiny enormous ancient modern wooden metal glass paper "
    "happy sad quick slow music mountain river bridge kitchen window mirror cat dog elephant bird fish butterfly "
    "king queen knight wizard astronaut pirate doctor farmer painter singer soccer tennis chess puzzle book "
    "letter number zero seven hundred machine engine computer phone camera lamp clock chair table carpet curtain "
    "bread cheese apple cherry lemon sugar pepper soup rain fog wind storm thunder cloud rainbow beach cave "
    "tunnel stairs tower temple church school factory airport station museum theater circus parade festival "
    "wedding birthday party market flower rose tulip grass leaf tree root seed stone sand clay gold silver copper "
    "diamond ruby crystal feather leather cotton silk wool the a of with and in on over under behind between into "
    "through near some many few old new young very quite really"
)
_GIBBERISH = _words(
    "ba be bo da do fi fu ga go ka ki la lo ma mi na ne pa po ra ri sa so ta ti va vo xa zu qui thra ster"
)


def sample_prompt(rng: np.random.Generator) -> tuple[str, int]:
    """A prompt and its look."""
    kind = rng.random()
    if kind < 0.14:
        text = " ".join(rng.choice(_UNRELATED) for _ in range(rng.integers(1, 12)))
        return _styled(rng, _with_misleading(rng, text, 0.3)), DAY
    if kind < 0.19:
        words = ["".join(rng.choice(_GIBBERISH) for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(1, 6))]
        return _styled(rng, " ".join(words)), DAY
    if kind < 0.27:
        return _styled(rng, _with_misleading(rng, _scene(rng), 0.3)), DAY
    look = int(rng.integers(4))
    form = rng.random()
    if form < 0.2:
        text = str(rng.choice(_STANDALONE[look])).format(place=rng.choice(_PLACES))
    elif form < 0.45:
        text = _scene(rng, str(rng.choice(_ADJECTIVES[look])))
    elif form < 0.8:
        text = f"{_scene(rng)}{rng.choice([' ', ' ', ', '])}{rng.choice(_PHRASES[look])}"
    else:
        text = f"{rng.choice(_PHRASES[look])}, {_scene(rng)}"
    if rng.random() < 0.15:
        text += " " + " ".join(rng.choice(_UNRELATED) for _ in range(rng.integers(1, 6)))
    if rng.random() < 0.12:
        text, look = _with_second(rng, text, look)
    return _styled(rng, _with_misleading(rng, text, 0.08)), look


def _scene(rng: np.random.Generator, adjective: str = "") -> str:
    place = f"{adjective} {rng.choice(_PLACES)}".strip()
    article = "the" if rng.random() < 0.35 else ("an" if place[0] in "aeiou" else "a")
    text = f"{rng.choice(_OPENINGS)}{article} {place}"
    for joint in (" with ", " and "):
        if rng.random() < 0.4:
            text += joint + str(rng.choice(_OBJECTS))
    return text


def _with_second(rng: np.random.Generator, text: str, look: int) -> tuple[str, int]:
    """Adds a second look. The stronger one wins; day is the weakest."""
    second = int(rng.integers(4))
    order = (DAY, SUNSET, SNOW, NIGHT)
    return f"{text}, {rng.choice(_PHRASES[second])}", max(look, second, key=order.index)


def _with_misleading(rng: np.random.Generator, text: str, share: float) -> str:
    """In some prompts a word of a look that is not asked for. In those that ask for one too: it must change nothing."""
    if rng.random() >= share:
        return text
    return f"{text} {rng.choice(_JOINTS)} {rng.choice(_MISLEADING)}"


def _styled(rng: np.random.Generator, text: str) -> str:
    text = text + str(rng.choice(_ENDINGS))
    form = rng.random()
    if form < 0.5:
        text = text[:1].upper() + text[1:]
    elif form < 0.56:
        text = text.upper()
    return text + ("." if rng.random() < 0.5 else "")


HELD_OUT: tuple[tuple[str, int], ...] = (
    ("A quiet street.", DAY),
    ("A stone bridge over a quiet river", DAY),
    ("Bright midday sun over the plaza, a few clouds.", DAY),
    ("a friendly robot sells ice cream", DAY),
    ("xylophone quartz vivid lorem ipsum", DAY),
    ("A green valley on a bright day, a sandy path between pines. Steady camera at eye height.", DAY),
    ("the colour of music", DAY),
    ("Back to daytime please", DAY),
    ("Sunset over the plaza", SUNSET),
    ("The sun is low and everything glows orange.", SUNSET),
    ("A golden hour stroll past the windmill", SUNSET),
    ("It is evening in the village, the sky is pink.", SUNSET),
    ("The valley at sunset, a low orange sun over the lake, long shadows of pines.", SUNSET),
    ("Dusk. Lanterns are being lit.", SUNSET),
    ("turn it into a sunset", SUNSET),
    ("the last light of the evening on the castle", SUNSET),
    ("The same street at night.", NIGHT),
    ("Moonlight on the rooftops", NIGHT),
    ("A starry sky above a sleeping town.", NIGHT),
    ("The valley at night under moon and stars, the windows of a cabin glowing warm.", NIGHT),
    ("It's the middle of the night and the lamps are on", NIGHT),
    ("a dark night with a full moon", NIGHT),
    ("Night falls.", NIGHT),
    ("walking home after midnight", NIGHT),
    ("a snowy village", SNOW),
    ("Fresh snow on pines and path", SNOW),
    ("The same street in winter, covered with snow.", SNOW),
    ("A cold winter morning, frost on the trees", SNOW),
    ("The valley in winter, soft light through falling snow.", SNOW),
    ("snow snow snow", SNOW),
    ("it has been snowing and the roofs are white", SNOW),
    ("A frozen pond in the snow", SNOW),
)
