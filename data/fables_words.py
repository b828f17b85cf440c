"""The vocabulary of the fables: who is in them, what they wish for, where and when they happen.

Everything is a small table, because a table is the easiest thing to read and to extend. What matters is what the
columns tie together: a mole lives in a burrow and can dig, so it is the mole who is asked to dig and never the mole who
cannot; a blue egg belongs to a robin; a pond is learned to swim in. Those ties are what a model has to learn, and what
a reader can check. Words are few and come back often: a small model sees each of them many times.
"""

NAMES = {
    "she": """
        Ada Anna Bea Cora Dora Edda Elsie Fay Greta Hanna Ida Ines Juna Kiki Lena Lotta Lulu Maya Mia Mimi Nell Nora
        Olga Pia Polly Rosa Ruth Suri Tess Tilda Una Vera Willa Yara Zara Zita
    """,
    "he": """
        Abel Anton Arlo Bram Carlo Emil Felix Finn Fritz Gus Hugo Ivo Jasper Jonas Kofi Leo Linus Max Milo Ned Nico
        Olaf Oscar Otto Paco Pip Rafi Sami Theo Timo Toby Ugo Victor Wim Yuri Zeb
    """,
    "it": """
        Bobo Dinky Glim Jolly Momo Nub Pim Poko Tiko Tumtum Wobble Zuzu
    """,
}

# kind, where it lives, what it holds things with, what it can do. A kind in capitals is only ever a helper or a
# passer-by. Things (a boat, a cloud) are "it", a hen is "she" and an ox is "he", most kinds may be either.
KINDS = """
rabbit     burrow  paws    dig
mouse      hole    paws    tiny gnaw
hedgehog   nest    paws    prickly
fox        den     paws    smell sly
badger     den     paws    dig smell
squirrel   nest    paws    climb gnaw
mole       burrow  paws    dig
kitten     basket  paws    climb night
puppy      basket  paws    dig smell
lamb       barn    hooves
goat       barn    hooves  climb prickly
piglet     barn    hooves  smell
duck       nest    wings   swim fly
hen        barn    wings
frog       pond    hands   swim sing
otter      den     paws    swim
beaver     lodge   paws    swim gnaw
bear       cave    paws    strong
donkey     stable  hooves  strong carry
pony       stable  hooves  strong carry
sparrow    nest    wings   fly
robin      nest    wings   fly sing
crow       nest    wings   fly
tortoise   house   hands   prickly wise slow
girl       house   hands
boy        house   hands
OWL        -       wings   fly night wise
RAVEN      -       wings   fly wise
TOAD       -       feet    wise
HORSE      -       hooves  strong carry
OX         -       hooves  strong carry
DEER       -       hooves  carry
SWAN       -       wings   swim fly carry
GOOSE      -       wings   swim fly
BAT        -       wings   fly night
CAT        -       paws    climb night
DOG        -       paws    smell dig
LIZARD     -       feet    tiny climb
BEETLE     -       feet    tiny prickly
CRICKET    -       feet    tiny sing
LARK       -       wings   fly sing
WOLF       -       paws    sly
WEASEL     -       paws    sly
boat       -       -       thing
lantern    -       -       thing
cloud      -       -       thing
clock      -       -       thing
kite       -       -       thing
"""

TRAITS = """
brave careful cheerful clever curious friendly gentle happy hopeful kind lively merry patient quiet shy
"""

# name, where one lives, the way through it
LANDS = """
forest    | at the edge of a dark forest   | through the forest
meadow    | in a green meadow              | across the meadow
valley    | in a deep valley               | through the valley
village   | in a small village             | through the village
hill      | on a windy hill                | over the hill
farm      | on an old farm                 | across the farm
river     | beside a wide river            | along the river
shore     | by the sea                     | along the shore
lake      | near a blue lake               | around the lake
mountain  | at the foot of a tall mountain | along the mountain path
garden    | in a wild garden               | through the garden
island    | on a small island              | across the island
town      | in a busy little town          | through the streets
"""

# What stands in any land, so that something can happen beside it.
PLACES = ["old mill", "red barn", "tall oak", "deep well", "wooden gate", "broken tower", "white fence", "big rock"]
TREES = ["tall fir", "old pine", "high apple tree", "great birch"]
KIN = ["grandmother", "grandfather", "mother", "father", "aunt", "uncle"]

# Season: how its days are, what one sees at first, what one sees when all has ended well.
SEASONS = """
spring | bright mild fresh windy | The first flowers were open, and the birds were singing.
                                 / The snow had gone, and the grass was green again.
                                 / New leaves were on the trees. | The spring wind was soft and smelled of flowers.
                                 / All the birds of spring were singing.
summer | warm hot sunny bright   | The sun was high, and the bees were busy in the flowers.
                                 / The sky was blue, and there was not one cloud in it.
                                 / The grass was warm and dry. | The summer stars came out, one after another.
                                 / It was a warm night, and the crickets sang.
autumn | cool windy grey rainy   | Red and yellow leaves were falling.
                                 / The wind blew the leaves along the path.
                                 / The apples were ripe, and the nights were growing long.
                                 | The autumn wind blew, but nobody minded.
                                 / And the yellow leaves went on falling.
winter | cold snowy frosty white | Snow lay on the roofs and on the paths.
                                 / The snow was deep, and the air was very still.
                                 / There was ice on every window. | The snow fell softly, and all was well.
                                 / It was cold, but nobody minded.
"""
HOURS = ["morning", "day", "afternoon"]

# Things to wish for, by group: a noun and the adjectives it goes with.
THINGS = {
    "keepsake": """
        bell      | silver copper small golden
        ring      | golden silver copper shiny
        whistle   | wooden silver red small
        button    | blue golden round shiny
        coin      | golden silver old shiny
        marble    | green blue glass striped
        shell     | white pink round shiny
        spoon     | silver wooden golden small
        flute     | wooden silver small old
        ball      | red blue yellow striped
        cup       | copper golden blue small
        key       | golden copper old small
        comb      | silver wooden green small
        ribbon    | red blue yellow striped
        scarf     | red green striped soft
        hat       | red green yellow soft
        doll      | wooden small old soft
        feather   | white blue golden long
        mirror    | round silver small old
        pearl     | white pink round shiny""",
    "toy": """
        kite      | red blue yellow striped
        ball      | red blue yellow striped
        drum      | red blue small round
        ship      | wooden red small white
        swing     | wooden red small yellow
        hoop      | red wooden golden yellow
        doll      | wooden small old soft
        rope      | long red striped yellow""",
    "instrument": """
        flute     | wooden silver small old
        fiddle    | old small brown wooden
        drum      | red blue small round
        horn      | copper golden old long
        harp      | golden small old wooden
        trumpet   | golden copper small shiny
        whistle   | wooden silver red small""",
    "breakable": """
        cup       | blue white golden small
        bowl      | blue green white yellow
        jug       | brown blue white round
        plate     | blue green white golden
        lamp      | green old glass yellow
        teapot    | brown blue white round
        mirror    | round silver small old
        vase      | green blue glass white""",
    "clothing": """
        scarf     | red green striped soft
        hat       | red green yellow soft
        coat      | blue brown green warm
        blanket   | warm white striped soft
        cap       | red blue yellow soft
        shawl     | warm white green striped""",
    "plant": """
        sunflower | tall golden big yellow
        pumpkin   | big round golden fat
        rose      | red white pink yellow
        melon     | big round green fat
        bean      | green long fat tall
        apple tree| small young strong straight
        cabbage   | green big round fat
        strawberry| red sweet big fat""",
    "medicine": """
        rose      | white golden wild
        lily      | white golden pink
        root      | white red sweet
        berry     | black golden wild
        leaf      | silver golden round
        mushroom  | brown white round""",
    "part": """
        spring    | copper small shiny
        wheel     | copper small round
        screw     | small silver shiny
        chain     | copper silver thin
        pin       | small silver golden""",
}
