"""Train the small Llama checkpoint that the demo and the tests convert.

The text is made here, from templates over a small simulated world: who is where, who holds what,
the word that opens a place, a list read back, a saying repeated. Many sentences follow only from
an earlier one, so the model has to use its attention heads and suffers when they are merged.

    python recipes/demo/train.py

writes convert/assets/demo-model (1.2 M parameters, bf16) and two further texts from the same
templates, demo-text.txt (held out) and demo-calibration.txt. On two CPU cores it takes 10 minutes
and ends at a training loss of 0.644 per token. Perplexity on the held-out text, in windows of 256
tokens, when the weights of neighbouring KV heads are averaged:

    KV heads       8      4      2      1
    perplexity  1.89   6.49  16.20  17.54

The model has learned to read a list back, mostly, but not to answer what the key of a place is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).resolve().parents[2] / "convert" / "assets"

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1  # the trainer gives special tokens the first ids
VOCAB, WINDOW, BATCH = 512, 256, 16
STORIES_PER_BOOK = 8
TOKENIZER_CHARS, HELD_OUT_CHARS, CALIBRATION_CHARS = 1_000_000, 80_000, 40_000
PEAK_LR, WARMUP_STEPS = 4e-3, 100

NAMES = "Mara Tobin Ilse Oren Petra Hugo Lena Rufus Sela Bram Edda Niko Wanda Falk Greta Jonas"
COLOURS = "red blue green white black yellow brown grey"
THINGS = "lamp rope bell cup coin ring book drum knife basket map hat flute mirror candle spoon"
PLACES = "mill barn tower garden kitchen harbour chapel forest cellar market stable library"
GOODS = "apples pears eggs nails stones shells feathers beans"
WARES = "salt bread honey wool soap butter paper tea flour oil wood string"
ADJECTIVES = "old small quiet clever hungry happy lazy proud"
CREATURES = "goose fox cat owl horse mouse goat crow"
DEEDS = "sleeps sings waits hides dances dreams rests eats"
SPOTS = "under the bridge|by the river|behind the wall|on the roof|near the fire|in the snow"
NUMBERS = "one two three four five six seven eight nine"
SYLLABLES = "ka lo mi ru te na so vi pe du ga zo"


@dataclass
class World:
    """What is true at this point of a story; scenes read it and change it.

    `place` says where each person is, `holds` what each has ("red lamp"), oldest first.
    """

    rng: Random
    place: dict[str, str]
    holds: dict[str, list[str]]

    def people(self, count: int) -> list[str]:
        return self.rng.sample(list(self.place), count)

    def owner(self) -> str:
        return self.rng.choice([name for name, things in self.holds.items() if things])

    def words(self, table: str, count: int) -> list[str]:
        return self.rng.sample(table.split(), count)

    def belongings(self, name: str) -> str:
        return listing([f"the {thing}" for thing in self.holds[name]]) or "nothing"


def listing(items: list[str]) -> str:
    """Join as in speech: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def walk(world: World) -> str:
    (name,) = world.people(1)
    old = world.place[name]
    new = world.rng.choice([place for place in PLACES.split() if place != old])
    world.place[name] = new
    return f"{name} leaves the {old} and walks to the {new}. Now {name} is in the {new}."


def visit(world: World) -> str:
    guest, host = world.people(2)
    old, new = world.place[guest], world.place[host]
    if old == new:
        return f"{guest} and {host} are both in the {new}."
    world.place[guest] = new
    return f"{guest} leaves the {old} to visit {host}. Now {guest} and {host} are in the {new}."


def give(world: World) -> str:
    giver = world.owner()
    taker = world.rng.choice([name for name in world.place if name != giver])
    verb = "gives" if world.place[giver] == world.place[taker] else "sends"
    thing = world.holds[giver].pop(world.rng.randrange(len(world.holds[giver])))
    world.holds[taker].append(thing)
    return (
        f"{giver} {verb} the {thing} to {taker}. Now {taker} has {world.belongings(taker)}, "
        f"and {giver} has {world.belongings(giver)}."
    )


def look_for(world: World) -> str:
    owner = world.owner()
    thing, place = world.rng.choice(world.holds[owner]), world.place[owner]
    return (
        f"Where is the {thing}? {owner} has the {thing} and {owner} is in the {place}, "
        f"so the {thing} is in the {place}."
    )


def shop(world: World) -> str:
    writer, reader = world.people(2)
    wares = ", ".join(world.words(WARES, world.rng.randint(4, 6)))
    return f"{writer} writes a list: {wares}. {reader} reads the list of {writer}: {wares}."


def say(world: World) -> str:
    speaker, hearer = world.people(2)
    adjective, creature, deed = (world.words(t, 1)[0] for t in (ADJECTIVES, CREATURES, DEEDS))
    saying = f"The {adjective} {creature} {deed} {world.rng.choice(SPOTS.split('|'))}."
    return f'{speaker} says, "{saying}" {hearer} says the same as {speaker}, "{saying}"'


def count(world: World) -> str:
    counter, taker = world.people(2)
    (goods,) = world.words(GOODS, 1)
    spoken = NUMBERS.split()[: world.rng.randint(3, 9)]
    return (
        f"{counter} counts the {goods}: {', '.join(spoken)}. There are {spoken[-1]} {goods}. "
        f"{taker} takes one of the {goods}, so {spoken[-2]} {goods} are left."
    )


def look_up(world: World) -> str:
    syllables = SYLLABLES.split()
    keys = {p: "".join(world.rng.choices(syllables, k=3)) for p in world.words(PLACES, 3)}
    rules = " ".join(f"The key of the {place} is {key}." for place, key in keys.items())
    asked = world.rng.sample(list(keys), 2)
    answers = " ".join(f"What is the key of the {p}? It is {keys[p]}." for p in asked)
    return f"{rules} {answers}"


SCENES: tuple[Callable[[World], str], ...] = (
    walk, visit, give, give, look_for, look_for, shop, say, count, look_up,
)  # fmt: skip


def story(rng: Random) -> str:
    """One story, a scene per line: an opening, some scenes, and where everything ended."""
    names = rng.sample(NAMES.split(), rng.choice((2, 3)))
    places = rng.sample(PLACES.split(), len(names))
    colours, nouns = (rng.sample(table.split(), len(names)) for table in (COLOURS, THINGS))
    things = [f"{colour} {noun}" for colour, noun in zip(colours, nouns, strict=True)]
    world = World(
        rng,
        place=dict(zip(names, places, strict=True)),
        holds={name: [thing] for name, thing in zip(names, things, strict=True)},
    )
    opening = " ".join(
        f"{name} is in the {world.place[name]} with a {thing}."
        for name, thing in zip(names, things, strict=True)
    )
    scenes = [scene(world) for scene in rng.choices(SCENES, k=rng.randint(3, 5))]
    ends = [f"{n} is in the {world.place[n]} with {world.belongings(n)}." for n in names]
    return "\n".join([opening, *scenes, f"In the end {' '.join(ends)}"])


def books(seed: str, total_chars: int) -> Iterator[str]:
    """Books of a few stories each, until they hold at least `total_chars` together."""
    rng = Random(seed)
    while total_chars > 0:
        book = "".join(story(rng) + "\n\n" for _ in range(STORIES_PER_BOOK))
        total_chars -= len(book)
        yield book


def build_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE that, as in Llama, begins each text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, BOS_ID)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that AutoTokenizer reads, under the class name every version knows."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=2 * WINDOW,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Tokenizer, seed: str, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches [B, T] cut from one stream of books that never repeats."""
    need = BATCH * WINDOW
    stream: list[int] = []
    for book in books(seed, sys.maxsize):
        stream += [*tokenizer.encode(book).ids, EOS_ID]
        if len(stream) >= need:
            yield torch.tensor(stream[:need]).view(BATCH, WINDOW)
            stream, steps = stream[need:], steps - 1
        if steps == 0:
            return


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warm * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, seed: str) -> float:
    """Train in place; return the mean loss over the last 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    losses: list[float] = []
    start = time.monotonic()
    for step, tokens in enumerate(batches(tokenizer, seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - start
            mean = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{steps} loss {mean:.3f} {elapsed:.0f}s", file=sys.stderr)
    return sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Perplexity over separate windows `tokens` [B, T]; the first of each is only context."""
    model.eval()
    losses = [
        model(input_ids=part, labels=part).loss * len(part) for part in torch.split(tokens, BATCH)
    ]
    return math.exp(sum(losses).item() / len(tokens))


def pooled(model: LlamaForCausalLM, kv_heads: int) -> LlamaForCausalLM:
    """A copy with the mean of neighbouring KV heads: weights [Hkv*D, E] to [kv_heads*D, E]."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": kv_heads})
    state = model.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            grouped = weight.view(kv_heads, -1, config.head_dim, config.hidden_size)
            state[name] = grouped.mean(dim=1).flatten(0, 1)
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(state)
    return copy


def report(folder: Path, text: str) -> None:
    """Print what the saved checkpoint scores on `text`, as it is and with pooled KV heads."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text).input_ids)
    tokens = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    print(f"held-out text: {len(text)} characters, {len(ids)} tokens")
    for kv_heads in (8, 4, 2, 1):
        print(f"{kv_heads} KV heads: perplexity {perplexity(pooled(model, kv_heads), tokens):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for model and text")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # The order of sums, and so the last bits of the weights, depends on the number of threads.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    tokenizer = build_tokenizer(books(f"tokenizer {args.seed}", TOKENIZER_CHARS))
    model = build_model()
    loss = train(model, tokenizer, args.steps, f"train {args.seed}")
    print(f"final training loss: {loss:.3f}")

    folder = args.out / "demo-model"
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    text = "".join(books(f"held-out {args.seed}", HELD_OUT_CHARS)).rstrip() + "\n"
    (args.out / "demo-text.txt").write_text(text, encoding="ascii", newline="\n")
    calibration = "".join(books(f"calibration {args.seed}", CALIBRATION_CHARS)).rstrip() + "\n"
    (args.out / "demo-calibration.txt").write_text(calibration, encoding="ascii", newline="\n")
    report(folder, text)


if __name__ == "__main__":
    main()
