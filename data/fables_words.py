"""The vocabulary of the fables: who is in them, what they wish for, where and when they happen.

Everything is a small table, because a table is the easiest thing to read and to extend. What matters is what the
columns tie together: a mole lives in a burrow and can dig, so it is the mole who is asked to dig and never the mole who
cannot; a blue egg belongs to a robin; a pond is learned to swim in. Those ties are what a model has to learn, and what
a reader can check. Words are few and come back often: a small model sees each of them many times.
"""

NAMES = {
    "she": """Ada Anna Bea Cora Dora Edda Elsie Fay Greta Hanna Ida Ines Juna Kiki Lena Lotta Lulu Maya Mia Mimi Nell
        Nora Olga Pia Polly Rosa Ruth Suri Tess Tilda Una Vera Willa Yara Zara Zita""".split(),
    "he": """Abel Anton Arlo Bram Carlo Emil Felix Finn Fritz Gus Hugo Ivo Jasper Jonas Kofi Leo Linus Max Milo Ned
        Nico Olaf Oscar Otto Paco Pip Rafi Sami Theo Timo Toby Ugo Victor Wim Yuri Zeb""".split(),
    "it": "Bobo Dinky Glim Jolly Momo Nub Pim Poko Tiko Tumtum Wobble Zuzu".split(),
}

# kind, where it lives, what it holds things with, what it can do. A kind in capitals is only ever a helper or a
# passer-by; "girl" and "boy" have their pronoun, things (a boat, a cloud) are "it", all other kinds may be she or he.
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
frog       pond    feet    swim sing
otter      den     paws    swim
beaver     lodge   paws    swim gnaw
bear       cave    paws    strong
donkey     stable  hooves  strong carry
pony       stable  hooves  strong carry
sparrow    nest    wings   fly
robin      nest    wings   fly sing
crow       nest    wings   fly
tortoise   garden  feet    prickly wise slow
girl       house   hands
boy        house   hands
OWL        tree    wings   fly night wise
RAVEN      tree    wings   fly wise
TOAD       garden  feet    wise
HORSE      stable  hooves  strong carry
OX         barn    hooves  strong carry
DEER       forest  hooves  carry
SWAN       lake    wings   swim fly carry
GOOSE      barn    wings   swim fly
BAT        cave    wings   fly night
CAT        house   paws    climb night
DOG        house   paws    smell dig
LIZARD     wall    feet    tiny climb
BEETLE     garden  feet    tiny prickly
CRICKET    meadow  feet    tiny sing
LARK       nest    wings   fly sing
WOLF       den     paws    sly
WEASEL     den     paws    sly
boat       -       -       thing
lantern    -       -       thing
cloud      -       -       thing
clock      -       -       thing
kite       -       -       thing
"""

TRAITS = (
    "brave careful cheerful clever curious friendly gentle happy hopeful kind lively merry patient quiet shy".split()
)

# name, where one lives, the way through it
LANDS = """
forest    | at the edge of a deep forest   | through the forest
meadow    | in a green meadow              | across the meadow
valley    | in a quiet valley              | through the valley
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
PLACES = ["old mill", "stone bridge", "tall oak", "deep well", "wooden gate", "hollow tree", "white fence", "big rock"]
TREES = ["tall oak", "old pine", "high apple tree", "great birch"]
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
                                 | Outside, the autumn wind blew, but nobody minded.
                                 / Outside, the yellow leaves went on falling.
winter | cold snowy frosty white | Snow lay on the roofs and on the paths.
                                 / The snow was deep, and the air was very still.
                                 / There was ice on every window. | Outside, the snow fell softly.
                                 / Outside it was cold, but inside it was warm.
"""
HOURS = ["morning", "day", "afternoon"]

# Things to wish for, by group: a noun and the adjectives it goes with.
THINGS = {
    "keepsake": """
        bell      | silver copper little golden
        ring      | golden silver copper shiny
        whistle   | wooden silver red little
        button    | blue golden round shiny
        coin      | golden silver old shiny
        marble    | green blue glass striped
        shell     | white pink round shiny
        spoon     | silver wooden golden little
        flute     | wooden silver little old
        ball      | red blue yellow striped
        cup       | copper golden blue little
        key       | golden copper old little
        comb      | silver wooden green little
        ribbon    | red blue yellow striped
        scarf     | red green striped soft
        hat       | red green yellow soft
        doll      | wooden little old soft
        feather   | white blue golden long
        mirror    | round silver little old
        pearl     | white pink round shiny""",
    "toy": """
        kite      | red blue yellow striped
        ball      | red blue yellow striped
        drum      | red blue little round
        sledge    | wooden red little blue
        swing     | wooden red little yellow
        hoop      | red wooden golden yellow
        doll      | wooden little old soft
        rope      | long red striped yellow""",
    "instrument": """
        flute     | wooden silver little old
        fiddle    | old little brown wooden
        drum      | red blue little round
        horn      | copper golden old long
        harp      | golden little old wooden
        trumpet   | golden copper little shiny
        whistle   | wooden silver red little""",
    "breakable": """
        cup       | blue white golden little
        bowl      | blue green white yellow
        jug       | brown blue white round
        plate     | blue green white golden
        lamp      | green old glass yellow
        teapot    | brown blue white round
        mirror    | round silver little old
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
        apple tree| little young strong straight
        cabbage   | green big round fat
        strawberry| red sweet big fat""",
    "medicine": """
        rose      | white golden wild
        mint      | green silver wild
        moss      | silver green soft
        root      | white red sweet
        lily      | white golden pink
        thyme     | green wild sweet""",
    "part": """
        spring    | copper little shiny
        wheel     | copper little round
        screw     | little silver shiny
        chain     | copper silver thin
        pin       | little silver golden""",
}

# Wishes with a little tale of their own. The first line names the columns, the first column is what is wished for (or
# feared, or guessed), and a column called "not" lists what a hero must not be able to do already.
THEMES = {
    "food": """
wish     | full
honey    | a jar of honey
bread    | a loaf of bread
cheese   | a piece of cheese
berries  | a basket of berries
nuts     | a bag of nuts
apples   | a basket of apples
soup     | a pot of soup
plums    | a bowl of plums
cherries | a bowl of cherries
carrots  | a bunch of carrots""",
    "cake": """
wish        | filling  | full
honey cake  | honey    | a jar of honey
apple cake  | apples   | a basket of apples
nut cake    | nuts     | a bag of nuts
cherry cake | cherries | a bowl of cherries
carrot cake | carrots  | a bunch of carrots
plum cake   | plums    | a bowl of plums
cheese cake | cheese   | a piece of cheese""",
    "skill": """
wish           | not  | first | second | tip
swim           | swim | {He} jumped into the pond and swallowed a mouthful of water. | {His} legs went down and {his} nose went under. | Breathe slowly, and kick like a frog.
whistle        | sing | {He} blew and blew, but only air came out. | {He} blew until {his} face was red, but there was no sound at all. | Make a small round mouth, and blow as softly as the wind.
dance          | -    | {He} turned left when everyone turned right. | {He} stepped on {his} own {hero.limb} and fell over. | Do not count the steps. Listen to the music.
skip stones    | -    | The first stone went straight down with a splash. | The second stone made a bigger splash and was gone. | Take a flat stone, and throw it low.
fly a kite     | -    | The kite bumped along the ground like a sack. | The kite went up, turned around and fell on its nose. | Turn your back to the wind, and let the string go slowly.
row a boat     | -    | The boat went around and around like a top. | The boat bumped into the bank and stuck there. | Pull with both sides at the same time.
juggle         | -    | All three apples fell on {his} head. | One apple rolled away, and two fell on {his} nose. | Begin with one apple. Then take two. Then take three.
bake bread     | -    | The first bread was as hard as a stone. | The second bread was as black as the night. | Let it rest in a warm place before you bake it.
play the flute | -    | The flute squeaked like an old door. | The flute made a sound like a sick goose. | Play one note until it is your friend, and then play the next.
walk on a rope | -    | {He} fell off after the first step. | {He} took two steps, and then {he} fell into the grass. | Look at the end of the rope and not at the ground.
tell stories   | sly  | {He} told the end first, and nobody laughed. | In the middle {he} forgot what came next. | Tell it to one friend, as if it had happened to you.
draw a horse   | -    | {His} horse looked like a table with ears. | {His} second horse had five legs and no neck. | Look at the horse for a long time before you draw.""",
    "fear": """
wish           | why | look | truth
the dark       | At night, the shadows in the corner looked like monsters. | sat down in the dark and waited until their eyes could see | The monster in the corner was only a coat on a chair.
the thunder    | When it rolled over the roofs, {he} hid under the bed. | sat at the window and counted from the flash to the boom | Each time they could count a little further, for the storm was going away.
the deep well  | A deep voice lived in it and answered every word. | went to the well and called down a kind word | The voice called the same kind word back, for it was only their own.
the old mill   | When the wind blew, a terrible groan came from inside. | opened the door of the old mill and looked inside | The groan came from an old wheel that the wind was turning.
the big dog    | It stood behind the fence and barked at everyone. | went to the fence with a piece of bread | The big dog ate the bread, and its tail began to wag.
the tall tower | From the top, the ground looked terribly far away. | climbed the tower slowly, one step at a time | From the top they could see their own homes, as small as toys.
the cellar     | Something was always scratching down there. | went down into the cellar with a small lamp | The scratching came from a family of mice who were making a bed.""",
    "riddle": """
wish       | ask | why
a river    | I run all day and never grow tired. I have a bed, but I never sleep in it. | It runs to the sea, and its bed is never made
a shadow   | I walk with you in the sun and leave you in the dark. | It is there in the sun and gone in the dark
a candle   | I am tall when I am young and short when I am old. | It grows shorter while it burns
an echo    | I have no mouth, but I answer everyone. I know every language. | It says back whatever you say
the wind   | I have no hands, but I open doors. I have no mouth, but I sing in the trees. | It opens doors and sings in the trees
the moon   | I am thin, and then I am fat, and yet I never eat a bite. | It grows and grows without eating
a clock    | I have two hands, but I cannot hold a cup. | Its hands only show the time
an egg     | I am a white house without a door, and whoever lives in me must break the wall. | A chick breaks the wall and walks out
a road     | I go over the hills and through the town, and yet I never move. | It goes everywhere and stays where it is
a needle   | I have only one eye, and I cannot see. | Its one eye is for the thread
a book     | I have many leaves, but I am not a tree. I have many words, but I cannot speak. | Its leaves are full of words
a bell     | I have one tongue and no teeth, and the whole village listens to me. | It has a tongue and it rings
the snow   | I fall all day long, and it never hurts me. | It falls and falls without a sound
a tree     | I wear a green coat in summer, and in winter I wear nothing at all. | It drops its leaves when the cold comes""",
    "message": """
wish   | message
soup   | The soup is warm, and your chair is waiting.
garden | The first flowers are open in the garden.
baby   | The baby has come, and she has your nose.
boat   | The boat is ready. Come before the snow.
roof   | The roof is mended, and there is room for two.
apples | The apples are ripe. Bring a big basket.
song   | I have made a new song, and it is for you.
lamp   | I have put a lamp in the window for you.
bread  | The bread is in the oven. Come when you can.
winter | Come and spend the winter with me.
stars  | I look at the stars each night and think of you.
fence  | The fence is broken. I need your help.""",
    "egg": """
wish        | mother
blue egg    | robin
white egg   | goose
brown egg   | hen
green egg   | duck
spotted egg | sparrow
grey egg    | swan
yellow egg  | lark""",
    "sky": """
wish        | how | fall | where | truth
the moon    | climbed up to the highest branch of a tree | The moon was as far away as before. | in a bucket of water by the door | The moon lay in the water, round and white
a star      | stood on the highest hill and jumped | The stars were as far away as before. | in the dark grass | A firefly sat there and shone like a star
a rainbow   | ran over three fields to where it stood | The rainbow had moved on to the next hill. | over the garden, where the water was splashing | A little rainbow stood in the drops
a cloud     | climbed to the very top of the hill | The clouds were as far away as before. | on the path the next morning, in the white mist | A cloud had come down in the night
the sun     | followed the road all day to where it goes down | The sun went down behind another hill. | on the old stone wall | The stone was still full of sun and warm to touch""",
    "far": """
wish           | sight
sea            | It was wide and blue, and it had no end.
lighthouse     | It was tall and white, and its light went around and around.
waterfall      | It was taller than a tower, and there was a rainbow in it.
harbour        | It was full of ships with red and white sails.
palace         | It had seven towers and a golden roof.
desert         | It was all yellow sand, as far as one could see.
whale          | It was as big as a hill, and it blew water high into the air.
island         | It was small and green, with one tall tree on it.
city           | It had a thousand windows, and all of them were shining.
mountain       | It was so high that it had snow on its head in summer.""",
    "lost at night": """
wish      | came | home
fisherman | a fisherman in a small boat | brought the boat to the shore
doctor    | a doctor on the way to a sick child | found the door of the sick child
postman   | a postman with a heavy bag | found the path to the village
shepherd  | a shepherd with seven sheep | brought all the sheep home
sailor    | a sailor on a great ship | turned the ship away from the rocks
baker     | a baker with a cart full of bread | found the bridge over the river
king      | a king on a tired horse | found the road to the palace""",
    "hiding place": """
wish        | into
barrel      | into
basket      | into
haystack    | into
cupboard    | into
hollow tree | into
old boat    | under
big bed     | under
cart        | under
stairs      | under
curtain     | behind
stove       | behind
wall        | behind""",
    "house": """
wish         | with
red door     | a red door
round window | a round window
green roof   | a green roof
yellow fence | a yellow fence
tall chimney | a tall chimney
warm stove   | a warm stove
blue gate    | a blue gate
big table    | a big table
soft bed     | a soft bed""",
}
