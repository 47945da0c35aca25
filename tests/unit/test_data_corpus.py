"""Pretraining batches of generated problems."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.data import CharTokenizer, build_task
from megatron_occ.data.corpus import TaskCorpus

TASK = build_task("reversed_multiplication", digits_a=2, digits_b=1)
TOKENIZER = CharTokenizer(TASK.alphabet)


def test_a_row_is_prompt_solution_eos_and_padding():
    ids, mask = TaskCorpus(TASK, TOKENIZER).batch(step=2, size=3, sequence_length=20)
    assert ids.shape == mask.shape == (3, 20)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.float32
    for row in range(3):
        problem = TASK.problem("train", 2 * 3 + row)
        # "ba*d=" is 5 characters, "xyz=xyz." 8, then eos and 6 of padding.
        text = problem.prompt + problem.solution
        assert len(text) == 13
        assert ids[row].tolist() == [*TOKENIZER.encode(text), 1, 0, 0, 0, 0, 0, 0]
        assert mask[row].tolist() == [0.0] * 5 + [1.0] * 9 + [0.0] * 6


def test_prompt_in_the_loss_starts_at_the_second_token():
    _, mask = TaskCorpus(TASK, TOKENIZER, mask_prompt=False).batch(0, 1, 16)
    assert mask[0].tolist() == [0.0] + [1.0] * 13 + [0.0] * 2


def test_exact_fit_and_one_too_short():
    corpus = TaskCorpus(TASK, TOKENIZER)
    ids, _ = corpus.batch(0, 2, 14)
    assert (ids[:, -1] == TOKENIZER.eos_id).all()
    with pytest.raises(ValueError, match="sequence length 13: raise it to at least 14"):
        corpus.batch(0, 2, 13)


def test_batches_tile_the_stream_and_depend_on_seed_and_split():
    corpus = TaskCorpus(TASK, TOKENIZER)
    whole = corpus.batch(0, 6, 14)[0]
    assert torch.equal(torch.cat([corpus.batch(s, 2, 14)[0] for s in range(3)]), whole)
    assert not torch.equal(TaskCorpus(TASK, TOKENIZER, seed=1).batch(0, 6, 14)[0], whole)
    validation = TaskCorpus(TASK, TOKENIZER, split="validation").batch(0, 1, 14)[0]
    problem = TASK.problem("validation", 0)
    assert TOKENIZER.decode(validation[0].tolist()) == problem.prompt + problem.solution


def test_noise_redraws_its_share_of_the_solutions_tokens_and_no_others():
    clean, mask = TaskCorpus(TASK, TOKENIZER).batch(0, 2000, 14)
    noisy = TaskCorpus(TASK, TOKENIZER, label_noise=0.3)
    ids, noisy_mask = noisy.batch(0, 2000, 14)
    assert torch.equal(noisy_mask, mask)
    changed = ids != clean
    # prompt ("ba*d=") and eos stay
    assert not changed[:, :5].any()
    assert not changed[:, 13].any()
    # a redrawn token is often the one that was there: solutions repeat few characters
    same = torch.stack([(clean == clean[:, [k]])[:, :13].float().mean(1) for k in range(5, 13)], 1)
    expected = 0.3 * (1 - same).mean(0)
    share = changed[:, 5:13].float().mean(0)
    assert share.tolist() == pytest.approx(expected.tolist(), abs=0.04)
    assert float(share.mean()) == pytest.approx(float(expected.mean()), abs=0.01)
    # only by tokens that the problem has
    assert (ids[:, :, None] == clean[:, None]).any(-1).all()


def test_noise_is_a_function_of_the_problems_number_alone():
    noisy = TaskCorpus(TASK, TOKENIZER, label_noise=0.3)
    whole = noisy.batch(0, 6, 14)[0]
    assert torch.equal(torch.cat([noisy.batch(s, 2, 14)[0] for s in range(3)]), whole)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"split": "test"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"-1|test"):
        TaskCorpus(TASK, TOKENIZER, **arguments)
    with pytest.raises(ValueError, match="size=0"):
        TaskCorpus(TASK, TOKENIZER).batch(0, 0, 14)
