"""The words of friendly names. Number and order of the words decide the name of every peer: never change them."""

from __future__ import annotations

ADJECTIVES: tuple[str, ...] = tuple(
    """able agile amber ample apt azure balmy bold brave breezy bright brisk calm candid cheery civil clear clever cosy crisp
    curious dapper daring deft eager early earnest easy fabled fair fancy fearless fleet fond frank free fresh gentle glad golden
    good grand green handy happy hardy hearty honest humble ideal jolly jovial keen kind lively loyal lucid lucky lunar mellow
    merry mighty mild modest neat nimble noble novel odd open patient peppy placid plucky polite prime proud quick quiet rapid
    ready regal robust rosy royal sage serene sharp silver sleek snug sober solar solid spry stable steady still stout sunny sure
    swift tidy tranquil true trusty upbeat valiant vivid warm wise witty zesty""".split()
)

ANIMALS: tuple[str, ...] = tuple(
    """adder albatross alpaca antelope auk badger bat bear beaver bee beetle bison boar bobcat buffalo bunting camel caribou cat
    cheetah chough cicada cobra condor coot cougar coyote crab crane cricket crow curlew deer dingo dolphin donkey dove dragonfly
    duck eagle eel egret elk emu falcon ferret finch firefly fox frog gazelle gecko gibbon goat goose grouse gull hare hawk
    hedgehog heron hippo hornet horse ibex ibis iguana impala jackal jaguar jay kestrel kite kiwi koala lark lemur leopard linnet
    lion lizard llama lobster lynx macaw magpie marmot marten mole moose moth mouse newt ocelot octopus orca oriole osprey otter
    owl ox panda panther parrot pelican penguin pigeon pike plover pony puffin puma quail rabbit raccoon raven robin rook salmon
    seal shark sheep shrew skua sloth snipe sparrow squid stoat stork swallow swan swift tapir tern thrush tiger toad toucan
    trout turtle viper vole walrus wasp weasel whale wolf wombat wren yak zebra""".split()
)
