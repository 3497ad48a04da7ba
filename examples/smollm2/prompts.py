"""Instructions and questions in plain English, from templates, topics, an old story and generated puzzles. It knows no models.

Held-out prompts are made of topics, sentences and puzzles that the training prompts are not made of.
"""

import random
import re
from collections.abc import Callable

import reasoning_gym
from reasoning_gym.data import get_data_file_path

TOPICS = {
    "concept": """photosynthesis; gravity; evaporation; electricity; the water cycle; magnetism; friction; an ecosystem; natural
        selection; the immune system; a vaccine; the greenhouse effect; plate tectonics; an eclipse; the seasons; sound; a
        rainbow; a black hole; the Moon's phases; the tides; a volcano; an earthquake; lightning; a magnetic field; energy;
        inertia; density; a chemical reaction; an atom; a molecule; a cell; DNA; digestion; blood circulation; sleep; memory;
        pollination; recycling; renewable energy; erosion; fossil fuels; a food chain; hibernation; migration; camouflage;
        democracy; a constitution; inflation; supply and demand; a tax; interest on a loan; insurance; a budget; a stock
        market; human rights; freedom of speech; an election; a metaphor; irony; a myth; a fable; rhyme; a synonym; an
        adjective; perspective in painting; rhythm in music; harmony; an orchestra; an algorithm; a variable; a computer
        virus; encryption; the internet; a database; a search engine; open-source software; machine learning; a neural
        network; artificial intelligence; a prime number; a fraction; a percentage; an average; probability; a triangle;
        symmetry; infinity; the number pi; an equation; a hypothesis; a scientific experiment; the scientific method;
        evolution; climate change; biodiversity; the ozone layer; acid rain; a satellite; a rocket; the solar system; a
        galaxy; a comet; time zones; a map; latitude; the equator; the Industrial Revolution; the Renaissance; the Silk Road;
        ancient Egypt; the Roman Empire; the printing press; the steam engine; the telephone; penicillin; the bicycle;
        justice; friendship; courage; patience; honesty; teamwork; leadership; creativity; empathy; gratitude; critical
        thinking; good manners; peer pressure; stress; motivation; happiness; curiosity; a habit; self-confidence""",
    "thing": """an elephant; a penguin; a dolphin; an octopus; a spider; a honeybee; an owl; a tortoise; a kangaroo; a wolf; a polar
        bear; a butterfly; a shark; a camel; a giraffe; a bat; a crocodile; a frog; an ant; a horse; a cat; a dog; a parrot; a
        whale; a fox; a snail; a cactus; an oak tree; a sunflower; bamboo; a mushroom; a rose; seaweed; moss; an apple; a
        lemon; rice; bread; cheese; chocolate; coffee; tea; honey; a potato; a tomato; garlic; salt; sugar; soup; pasta;
        pizza; a pancake; an umbrella; a clock; a mirror; a candle; a bridge; a lighthouse; a windmill; a telescope; a
        microscope; a compass; a thermometer; a camera; a piano; a guitar; a violin; a drum; a pencil; a book; a library; a
        museum; a theatre; a castle; a lamp; a ladder; a key; a wheel; a kite; a balloon; a sailing boat; a train; a
        submarine; an aeroplane; a bicycle; a tractor; a robot; a keyboard; a washing machine; a refrigerator; a pair of
        glasses; a raincoat; a scarf; a tent; a backpack; a chessboard; a puzzle; snow; fog; a desert; a river; a waterfall;
        an island; a cave; a forest; a beach; a glacier; a mountain; the Moon; the Sun; a shooting star; a snowflake; a
        thunderstorm; an old house; a garden; a market""",
    "activity": """learning to swim; reading more books; growing tomatoes; baking bread; running a first marathon; playing chess;
        learning a new language; writing a diary; saving money; taking photographs; painting a wall; riding a bicycle in the
        city; looking after a dog; cleaning a kitchen; camping in the mountains; giving a speech; preparing for an exam;
        sleeping better; eating more vegetables; making new friends; working from home; drawing portraits; playing the guitar;
        cooking for a large family; planting a tree; travelling by train; keeping bees; watching birds; learning to code;
        writing a short story; doing yoga; repairing a bicycle; sewing a button; planning a birthday party; moving to a new
        town; starting a small business; volunteering; teaching children to read; hiking in winter; fishing; dancing; singing
        in a choir; collecting stamps; knitting a scarf; organising a bookshelf; using less water; sorting waste; starting a
        conversation; saying no politely; managing time; applying for a job; preparing for an interview; writing a thank-you
        letter; making coffee; packing a suitcase; reading a map; remembering names; staying calm under pressure; listening
        well; solving a disagreement with a neighbour; learning from mistakes; building a birdhouse; stargazing; skipping
        stones; making a paper boat; playing table tennis; skiing; climbing; rowing; gardening""",
    "place": """Paris; London; Rome; Berlin; Madrid; Lisbon; Vienna; Prague; Athens; Istanbul; Cairo; Nairobi; Cape Town; Lagos;
        Marrakesh; Delhi; Mumbai; Beijing; Shanghai; Tokyo; Kyoto; Seoul; Bangkok; Singapore; Jakarta; Sydney; Auckland; New
        York; Chicago; San Francisco; Mexico City; Havana; Lima; Rio de Janeiro; Buenos Aires; Toronto; Vancouver; Reykjavik;
        Oslo; Stockholm; Helsinki; Copenhagen; Amsterdam; Brussels; Zurich; Venice; Florence; Barcelona; Edinburgh; Dublin;
        France; Italy; Spain; Germany; Norway; Iceland; Greece; Turkey; Egypt; Kenya; South Africa; India; China; Japan;
        Thailand; Australia; New Zealand; Canada; Mexico; Brazil; Argentina; Chile; Peru; the Sahara; the Amazon rainforest;
        the Alps; the Himalayas; the Nile; the Danube; the Pacific Ocean; the Mediterranean Sea; Antarctica; Greenland;
        Madagascar; Hawaii; the Grand Canyon; Mount Everest; Niagara Falls; the Great Barrier Reef""",
    "job": """a teacher; a nurse; a carpenter; an electrician; a farmer; a baker; a librarian; a journalist; a pilot; a firefighter;
        a chef; a veterinarian; an architect; a lawyer; a judge; a translator; a photographer; a musician; a plumber; a
        tailor; a gardener; a dentist; a pharmacist; an astronaut; a geologist; a biologist; a software engineer; a data
        analyst; an accountant; a bus driver; a sailor; a museum guide; a tour guide; a receptionist; a waiter; a hairdresser;
        a mechanic; a postal worker; a surgeon; a paramedic; a social worker; a sports coach; an editor; a novelist; an actor;
        a stage designer; a bookseller; a beekeeper; a fisherman; a miner""",
}

TEMPLATES = {
    "concept": """
        Explain {} in simple words.
        What is {}?
        Explain {} to a ten-year-old.
        Write a short paragraph about {}.
        List three facts about {}.
        Define {} in one sentence.
        Why does {} matter in everyday life?
        How would you describe {} to a friend?
        Write a quiz question about {} and give the answer.
        What do people often get wrong about {}?
        Write a short poem about {}.
        Give a real-life example that has to do with {}.
        Can you summarise the main idea of {} in two sentences?
        I have to give a short talk about {}. How should I begin?
        Compare {} with something that everybody knows.
        Tell me about {}.
        Write a short dialogue in which a student asks a teacher about {}.
    """,
    "thing": """
        Describe {} to someone who has never seen one.
        Write a very short story about {}.
        Tell me three interesting facts about {}.
        Write a riddle whose answer is {}.
        What comes to mind when you think of {}?
        Write a short poem about {}.
        How has {} been important to people?
        Write one sentence about {} for a children's book.
        What are the main features of {}?
        Imagine that {} could talk. What would it say?
        Suggest a title for an essay about {}.
        List five words that describe {}.
        Why do people like {}?
        Write a caption for a picture of {}.
        What is the difference between a good drawing of {} and a bad one?
    """,
    "activity": """
        Give me three tips for {}.
        What are the benefits of {}?
        What mistakes do beginners make when {}?
        Write a short e-mail to a friend about {}.
        What do I need before {}?
        Write a short paragraph that encourages someone who is {}.
        Make a simple plan for {}.
        How long does {} usually take?
        I am afraid of {}. What should I do?
        What is the most important rule for {}?
        Explain {} step by step.
        Is {} a good idea for a busy person?
        Why do people enjoy {}?
        Write a short diary entry about {}.
    """,
    "place": """
        What is {} known for?
        Write a short travel note about {}.
        What should a visitor see in {}?
        What is the weather like in {}?
        Where is {}?
        Describe a day in {}.
        Write a postcard from {}.
        Tell me something about the history of {}.
        What food or animals are typical of {}?
        When is the best time to visit {}?
        Give three reasons to visit {}.
        How could I travel to {}, and what should I pack?
        Write the first two sentences of a story that is set in {}.
    """,
    "job": """
        What does {} do all day?
        What skills does {} need?
        Write a short cover letter for a job as {}.
        How do you become {}?
        Write three questions to ask {}.
        What is the hardest part of being {}?
        Describe a typical morning in the life of {}.
        Why might someone want to be {}?
        What tools does {} use?
        Give some advice to a young person who wants to become {}.
        Write a short story about {} on the first day at work.
    """,
    "sentence": """
        Rewrite this sentence in modern English: "{}"
        Put this sentence in simple words: "{}"
        What does the following sentence mean? "{}"
        Continue the story in two sentences: "{}"
        Write one question that this sentence answers: "{}"
        Shorten this sentence as much as you can: "{}"
        Name the nouns in this sentence: "{}"
        Is this sentence happy, sad or neutral, and why? "{}"
        Suggest a title for a story that contains this sentence: "{}"
        Who might say this, and to whom? "{}"
    """,
}

PUZZLES = ["gsm_symbolic", "gsm_symbolic", "gsm_symbolic", "family_relationships", "time_intervals", "leg_counting"]  # of reasoning_gym

HELD_OUT_SHARE = 0.1  # of the topics and sentences
MAX_CHARACTERS = 400  # of a puzzle


def make_prompts(num_train: int, num_heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """Return distinct training prompts and held-out prompts that share no topic, sentence or puzzle with them."""
    order = random.Random(seed)
    trained, held_out = {}, {}
    for kind, texts in ({kind: _split(topics, ";") for kind, topics in TOPICS.items()} | {"sentence": story_sentences()}).items():
        order.shuffle(texts)
        cut = round(len(texts) * HELD_OUT_SHARE)
        held_out[kind], trained[kind] = texts[:cut], texts[cut:]
    heldout = _draw(num_heldout, held_out, random.Random(seed + 1), exclude=set())
    return _draw(num_train, trained, random.Random(seed + 2), exclude=set(heldout)), heldout


def story_sentences() -> list[str]:
    """Return the sentences of middle length of "In the Year 2889" by Jules and Michel Verne (1889), which reasoning_gym contains."""
    text = get_data_file_path("in_the_year_2889.txt").read_text(encoding="utf-8")
    body = " ".join(re.split(r"\*\*\* (?:START|END) OF.*", text)[1].replace("_", "").replace("--", ", ").replace("Mr.", "Mr").split())
    sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?\"]+[.!?](?= [A-Z])", body)
    return sorted({sentence for sentence in sentences if 40 <= len(sentence) <= 200})


def _draw(count: int, topics: dict[str, list[str]], source: random.Random, exclude: set[str]) -> list[str]:
    """Draw `count` distinct prompts, every kind as often as the other, puzzles among them."""
    makers: list[Callable[[], str]] = [lambda: _puzzle(source), *(lambda kind=kind: _instruction(kind, topics, source) for kind in topics)]
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompt = source.choice(makers)()
        if prompt not in exclude:
            prompts[prompt] = None
    return list(prompts)


def _instruction(kind: str, topics: dict[str, list[str]], source: random.Random) -> str:
    return source.choice(_split(TEMPLATES[kind], "\n")).format(source.choice(topics[kind]))


def _puzzle(source: random.Random) -> str:
    """Draw a word problem short enough for a small model."""
    while True:
        question = reasoning_gym.create_dataset(source.choice(PUZZLES), seed=source.randrange(2**31), size=1)[0]["question"].strip()
        if len(question) <= MAX_CHARACTERS:
            return question


def _split(text: str, mark: str) -> list[str]:
    return [" ".join(part.split()) for part in text.strip().split(mark)]
