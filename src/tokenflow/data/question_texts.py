"""Prompts without a picture, in great variety: a language model's own answers to them keep what it knows.

All are made of templates and words of ours. None is a question of `tokenflow.evaluation.knowledge`.
"""

from __future__ import annotations

import random
import re


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in " ".join(text.split()).split(","))


_WORDS = {
    "thing": _list(
        """clock, bridge, lantern, violin, umbrella, compass, ladder, mirror, candle, bicycle, hammer,
        kettle, telescope, newspaper, pencil, blanket, suitcase, helmet, bottle, piano, wheel, basket,
        camera, key, map, rope, needle, bell, drum, boat, train, airplane, tractor, lighthouse, windmill,
        castle, library, garden, kitchen, museum, harbor, factory, school, hospital, market, tent, fence,
        chimney, spoon"""
    ),
    "animal": _list(
        """horse, elephant, penguin, owl, dolphin, turtle, rabbit, fox, wolf, eagle, whale, shark, butterfly,
        ant, frog, snake, lion, tiger, bear, camel, goat, sheep, cow, pig, duck, goose, squirrel, bat,
        crab, octopus, salmon, parrot, giraffe, zebra, kangaroo, koala, hedgehog, beaver, otter, lizard"""
    ),
    "food": _list(
        """bread, cheese, rice, soup, apple pie, chocolate, tea, coffee, milk, butter, pasta, tomato sauce,
        pancakes, potatoes, carrots, onions, oranges, grapes, nuts, eggs, salad, pizza, yogurt, olive oil"""
    ),
    "topic": _list(
        """rain, thunder, the moon, volcanoes, earthquakes, rivers, deserts, forests, glaciers, tides, wind,
        photosynthesis, evolution, electricity, magnetism, light, sound, atoms, cells, bacteria, vitamins,
        sleep, memory, dreams, music, painting, poetry, theater, cinema, football, chess, swimming,
        running, farming, fishing, trade, money, banks, taxes, laws, elections, democracy, castles,
        knights, pyramids, the Roman Empire, the Renaissance, printing, steam engines, computers, the
        internet, robots, satellites, rockets, telescopes, vaccines, recycling, solar power, friendship,
        kindness, patience, courage"""
    ),
    "country": _list(
        """Portugal, Greece, Norway, Sweden, Finland, Denmark, Poland, Austria, Hungary, Ireland, Canada,
        Mexico, Peru, Chile, Argentina, India, China, Thailand, Vietnam, Turkey, Iran, Nigeria, Morocco,
        Ethiopia, Australia, New Zealand, Cuba, Colombia, Ukraine, Belgium, the Netherlands, Switzerland"""
    ),
    "person": _list(
        """Isaac Newton, Albert Einstein, Marie Curie, Charles Darwin, Galileo, Aristotle, Plato, Cleopatra,
        Julius Caesar, Napoleon, Mozart, Beethoven, Vincent van Gogh, Pablo Picasso, Jane Austen, Mark
        Twain, Charles Dickens, Homer, Gandhi, Nelson Mandela, Abraham Lincoln, Alexander Graham Bell,
        Thomas Edison, Neil Armstrong, Christopher Columbus, Marco Polo"""
    ),
    "adjective": _list(
        """big, fast, old, young, happy, dark, heavy, strong, rich, loud, wet, early, easy, full, wide, deep,
        sharp, soft, clean, empty, brave, polite, thick, tall, near, open, true, cheap"""
    ),
    "verb": _list(
        """buy, win, push, begin, arrive, remember, laugh, build, give, teach, ask, sleep, rise, love, find"""
    ),
    "task": _list(
        """boil an egg, plant a tree, write a letter, learn a language, clean a window, make a sandwich, tie
        a knot, train for a race, save money, fix a flat tire, read a map, bake bread, grow tomatoes, wash
        a sweater, pack a suitcase, make tea, paint a wall, sharpen a knife, start a campfire, fold a
        shirt, write a story, prepare for an exam, sleep better, make new friends, take care of a plant"""
    ),
    "group": _list(
        """fruits, vegetables, trees, flowers, birds, fish, insects, countries in Europe, countries in Asia,
        cities, rivers, mountains, sports, musical instruments, tools, colors, shapes, metals, jobs,
        languages, kinds of weather, pieces of furniture, parts of a house, parts of a car, kinds of
        books, board games"""
    ),
    "number": _list(
        "four, five, six, seven, eight, nine, ten, eleven, twelve, fifteen, twenty, thirty, fifty"
    ),
}
_TEMPLATES = _list(
    """What is a {thing}?, What is a {thing} used for?, Who would use a {thing}?, How is a {thing} made?,
        Describe a {thing} in one sentence., Where would you see a {thing}?, What is a {animal}?, Where
        does a {animal} live?, What does a {animal} eat?, Tell me one fact about the {animal}., Is a
        {animal} bigger than a {animal2}?, How do you make {food}?, What goes well with {food}?, Who first
        made {food}?, Should one eat {food} every day?, What do you know of {topic}?, Explain {topic} to a
        child., What makes {topic} important?, Tell me something about {topic}., Give a short definition
        of {topic}., Write one sentence about {topic}., Write a short poem about {topic}., What is the
        capital of {country}?, Which language do people speak in {country}?, Where is {country}?, What is
        {country} known for?, Who was {person}?, When did {person} live?, What is {person} famous for?,
        What is the opposite of {adjective}?, Give another word for {adjective}., What is the past tense
        of {verb}?, Use the word {verb} in a sentence., Use the word {adjective} in a sentence., How do I
        {task}?, Give me one tip to {task}., What do I need to {task}?, Name three {group}., List five
        {group}., Name one of these: {group}., What is {number} plus {number2}?, What is {number} minus
        {number2}?, What is {number} times {number2}?, Is {number} an even number?, Which is larger:
        {number} or {number2}?, How do you spell {thing}?, What letter does the word {animal} start with?,
        Write a sentence about a {animal} and a {thing}., Make up a name for a {animal}., Tell a very
        short story about a {animal} and a {animal2}., Complete the sentence: The {thing} was, What rhymes
        with {thing}?, What do {food} and {food2} have in common?, Would you rather have a {animal} or a
        {animal2}?, What is the difference between a {thing} and a {thing2}?"""
)
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_SHORT = ("", "", " Answer in one sentence.", " Answer briefly.", " Answer with one word.")


def text_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different prompts without a picture; the same seed gives the same."""
    rng = random.Random(f"{seed} text")
    found: dict[str, None] = {}
    while len(found) < count:
        words = {}
        for kind, choices in _WORDS.items():
            words[kind], words[f"{kind}2"] = rng.sample(choices, 2)
        prompt = rng.choice(_TEMPLATES).format(**words)
        found[_ARTICLE.sub(r"\1n ", prompt) + rng.choice(_SHORT)] = None
    return list(found)
