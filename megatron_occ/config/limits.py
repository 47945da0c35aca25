"""Upper limits of numbers that have none of their own: for slips of the hand, not for users.

Each lies well above what was ever published or is of use, so that nobody meets it who means what he
writes, and low enough that counting with it ends: a model of so many layers is built for a dry run
in seconds, products of two stay exact in 64 bits, and a time limit fits the operating system's
timers (milliseconds in 31 bits). Published values stand beside them.
"""

from __future__ import annotations

LAYERS = 1_000  # DeepNet (arXiv 2203.00555): 1,000; Llama 3.1 405B: 126
DEPTHS = 32  # MTP: 1 in DeepSeek-V3, 3 in MiMo, 8 in Gloeckle et al. (arXiv 2404.19737)
WIDTH = 1_000_000  # Llama 3.1 405B: 53,248; also heads and ranks of projections
EXPERTS = 10_000  # of a layer; Switch Transformer (arXiv 2101.03961): 2,048
RANK_EXPERTS = 30_000  # of all layers of a rank; the whole of Kimi K2 has some 23,000
VOCABULARY = 10_000_000  # Gemma 3: 262,144
TOKENS = 100_000_000  # of a sequence or packed micro-batch; Llama 4 Scout: 10 million
SEQUENCES = 1_000_000  # of a batch, a rollout step or a set
MASK_IDS = 1_024  # that a token was drawn from, 4 bytes each for every token of a rollout
DRAFT = 1_000  # tokens of a draft: tens
STEPS = 1_000_000_000  # updates, and counts of things that happen once in a while
RANKS = 262_144  # the largest clusters: some 200,000 GPUs
LAG = 1_000  # RL steps between sampling and training; beyond some ten no loss learns
WORKERS = 1_024  # processes of a rank, or repetitions
REQUESTS = 10_000  # at once; each is a thread
SECONDS = 1_000_000  # eleven days
LEARNING_RATE = 1  # Adam then moves every weight by about 1 in an update
BASE = 10**15  # of the rotary embedding; 4.5e10 was trained with
FACTOR = 1_000_000  # weights of losses, ratios, bounds, temperatures
COLDEST = 0.001  # temperature of sampling but 0: logits are divided by it, and overflow
NORM = 10**12  # of a gradient: somebody may write a huge one for "never"
