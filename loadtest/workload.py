"""Synthetic work as in PPO: groups of completions of one prompt, with the length distributions of real preference data.

Pure and seeded: the same arguments give the same texts on every machine. Nothing is sent here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

# Common English words: nearly every tokenizer has one token for each, so a text of n words has about n tokens.
_COMMON_WORDS = """
    the of and to in is that it for was on are as with they be at one have this from by hot but what some we can out
    other were all your when up use word how said an each she which do their time if will way about many then them
    would write like so these her long make thing see him two has look more day could go come did my sound no most
    number who over know water than call first people may down side been now find any new work part take get place
    made live where after back little only round man year came show every good me give our under name very through
    just form great think say help low line before turn cause same mean differ move right boy old too does tell set
    three want air well also play small end put home read hand port large spell add even land here must big high such
    follow act why ask men change went light kind off need house picture try us again animal point mother world near
    build self earth father head stand own page should country found answer school grow study still learn plant cover
    food sun four thought let keep eye never last door between city tree cross since hard start might story saw far
    sea draw left late run while press close night real life few stop open seem together next white children begin
    got walk example ease paper often always music those both mark book letter until mile river car feet care second
    group carry took rain eat room friend began idea fish mountain north once base hear horse cut sure watch color
"""
WORDS = tuple(dict.fromkeys(_COMMON_WORDS.split()))


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A log-normal distribution of lengths in tokens."""

    median: float

    sigma: float
    """Standard deviation of the logarithm."""

    longest: int
    """Larger lengths are reduced to this one."""

    def draw(self, random_: random.Random) -> int:
        """Draw one length, between 1 and ``longest``."""
        return max(1, min(self.longest, round(self.median * math.exp(random_.gauss(0.0, self.sigma)))))


# Fitted to the median and the 95th percentile of 6,297 prompts and 12,594 completions of the test split of Anthropic's
# HH-RLHF (Bai et al. 2022, arXiv:2204.05862): 73 and 322 words a prompt (all turns), 38 and 163 words a completion, at
# 1.3 tokens a word. The fitted means, 110 and 56 words, are within 4 percent of the true ones.
HH_PROMPTS = LengthDistribution(median=95.0, sigma=0.90, longest=1024)
HH_COMPLETIONS = LengthDistribution(median=49.0, sigma=0.885, longest=768)

# Fitted in the same way to 550 prompts and 1,100 completions of PandaLM's test set (Wang et al. 2023,
# arXiv:2306.05087): 20 and 97 words a prompt, 29 and 117 words a completion.
PANDALM_PROMPTS = LengthDistribution(median=26.0, sigma=0.96, longest=512)
PANDALM_COMPLETIONS = LengthDistribution(median=38.0, sigma=0.85, longest=384)

# And to 2,010 prompts (question with passages) and 4,020 completions of FineGrainedRLHF's QA feedback (Wu et al. 2023,
# arXiv:2306.01693): 460 and 666 words a prompt, 67 and 126 words a completion.
PASSAGE_PROMPTS = LengthDistribution(median=598.0, sigma=0.225, longest=1536)
PASSAGE_COMPLETIONS = LengthDistribution(median=87.0, sigma=0.385, longest=512)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its completions."""

    prompt: str = field(repr=False)
    completions: tuple[str, ...] = field(repr=False)

    @property
    def items(self) -> list[dict[str, str]]:
        """The items of the group in the service's wire format."""
        return [{"prompt": self.prompt, "completion": completion} for completion in self.completions]


def draw_groups(
    num_groups: int,
    group_size: int,
    seed: int,
    prompts: LengthDistribution = HH_PROMPTS,
    completions: LengthDistribution = HH_COMPLETIONS,
) -> list[Group]:
    """Return groups of random texts with the given length distributions; equal arguments give equal groups."""
    random_ = random.Random(seed)  # noqa: S311  (a workload, not a secret)
    # Frequency falls with rank, as in real text (Zipf 1949).
    cumulative = [math.log(rank + 1) for rank in range(1, len(WORDS) + 1)]

    def text(num_words: int) -> str:
        return " ".join(random_.choices(WORDS, cum_weights=cumulative, k=num_words))

    return [
        Group(text(prompts.draw(random_)), tuple(" " + text(completions.draw(random_)) for _ in range(group_size)))
        for _ in range(num_groups)
    ]


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of work."""

    name: str

    group_size: int = 1
    """Completions of each prompt."""

    lengths: tuple[tuple[LengthDistribution, LengthDistribution], ...] = ((HH_PROMPTS, HH_COMPLETIONS),)
    """Length distributions of prompts and completions; the groups are divided equally among several of them."""

    def draw(self, num_items: int, seed: int) -> list[Group]:
        """Return groups with ``num_items`` items together, rounded up to whole groups, in a random order."""
        num_groups = -(-num_items // self.group_size)
        groups = [
            group
            for number, (prompts, completions) in enumerate(self.lengths)
            for group in draw_groups(
                len(range(number, num_groups, len(self.lengths))), self.group_size, seed + number, prompts, completions
            )
        ]
        random.Random(seed).shuffle(groups)  # noqa: S311  (a workload, not a secret)
        return groups


# Items of about 512 tokens each, the length for which throughput is often quoted.
EVEN_PROMPTS = LengthDistribution(median=384.0, sigma=0.0, longest=384)
EVEN_COMPLETIONS = LengthDistribution(median=128.0, sigma=0.0, longest=128)

_SHORT, _LONG = (PANDALM_PROMPTS, PANDALM_COMPLETIONS), (PASSAGE_PROMPTS, PASSAGE_COMPLETIONS)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("independent"),
        Workload("groups of 8", group_size=8),
        Workload("groups of 64", group_size=64),
        Workload("short", lengths=(_SHORT,)),
        Workload("long", lengths=(_LONG,)),
        Workload("512 tokens", lengths=((EVEN_PROMPTS, EVEN_COMPLETIONS),)),
        Workload("mixed", lengths=(_SHORT, (HH_PROMPTS, HH_COMPLETIONS), _LONG)),
    )
}
"""Workloads by name; lengths are those of human preference data unless the name gives them."""


def cut_into_requests(
    groups: Iterable[Group], items_per_request: int, shuffle_seed: int | None = None
) -> list[list[dict[str, str]]]:
    """Return the items of requests with ``items_per_request`` items each; the last may have fewer.

    Items are in the order of their groups, as in a trainer's whole batch, or, with a seed, shuffled, as rollouts that
    end at different times.
    """
    items = [item for group in groups for item in group.items]
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(items)  # noqa: S311  (a workload, not a secret)
    return [items[start : start + items_per_request] for start in range(0, len(items), items_per_request)]
