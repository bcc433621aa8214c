"""What the methods promise of each other, on the trained pair: orderings, never speed."""

import pytest
import torch

from draftdiff.llm import (
    Chain,
    FalconDrafter,
    KBest,
    LongSpecDrafter,
    ModelDrafter,
    NGramDrafter,
    Sampled,
    StaticTree,
    generate_distillation_set,
    rank_acceptance,
    report,
    speculative,
)
from draftdiff.models.llm import example_prompts, load


@pytest.fixture(name="model", scope="module")
def _model():
    return load(None, None, device="cpu")


def reports(model, make, length=160, **options):
    """Of a generation from each of four prompts of so many tokens."""
    torch.manual_seed(0)
    found = []
    for ids in example_prompts(model, 4, length):
        drafter = make(model.draft)
        given = {"do_sample": False, "max_new_tokens": 48, "custom_generate": speculative, "drafter": drafter}
        given |= {"pace": None} | options
        model.target.generate(ids, **given)
        found.append(report(drafter))
    return found


def tokens_per_forward(found):
    return sum(one.tokens for one in found) / sum(one.target_forwards for one in found)


def test_a_tree_gains_more_tokens_per_forward_than_its_best_path(model):
    chain = reports(model, lambda draft: ModelDrafter(draft, Chain(4)))
    tree = reports(model, lambda draft: ModelDrafter(draft, KBest(4, 3, 12)))
    assert tokens_per_forward(tree) > tokens_per_forward(chain) > 1.5


def test_stopping_where_the_draft_is_unsure_wastes_fewer_drafts(model):
    static = reports(model, lambda draft: ModelDrafter(draft, Chain(6)))
    adaptive = reports(model, lambda draft: ModelDrafter(draft, Chain(6, confidence=0.3)))
    waste = [sum(one.drafted for one in found) / sum(one.tokens for one in found) for found in (static, adaptive)]
    assert waste[1] < 0.8 * waste[0]
    assert sum(one.mbsu for one in adaptive) > sum(one.mbsu for one in static)


def test_several_samples_are_accepted_more_often_than_one(model):
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 64}
    one = reports(model, lambda draft: ModelDrafter(draft, Chain(2)), **options)
    several = reports(model, lambda draft: ModelDrafter(draft, Sampled((4, 2))), **options)
    assert tokens_per_forward(several) > tokens_per_forward(one)


def test_longer_chains_are_accepted_further_but_less_at_every_depth(model):
    found = reports(model, lambda draft: ModelDrafter(draft, Chain(5)))
    tried = [sum(one.tried[d] for one in found if len(one.tried) > d) for d in range(5)]
    assert tried == sorted(tried, reverse=True)


def test_program_text_is_repetitive_enough_for_n_grams(model):
    assert tokens_per_forward(reports(model, lambda _: NGramDrafter(nodes=16))) > 1.2


def test_heads_that_read_the_drafted_tokens_are_right_more_often_than_those_that_do_not(model):
    hydra, medusa = model.heads["hydra"], model.heads["medusa"]
    assert hydra.heads.settings.heads == medusa.heads.settings.heads  # made in the same way from the same text
    prompts = example_prompts(model, 8, 128)  # of modules that neither has seen
    written = generate_distillation_set(
        model.target, [ids[0] for ids in prompts], temperatures=(0.0,), max_new_tokens=96, progress=False
    )
    shares = [rank_acceptance(one.heads, model.target, written, ranks=1)[:, 0] for one in (hydra, medusa)]
    assert (shares[0] > shares[1]).all() and shares[0].mean() > 1.2 * shares[1].mean()
    tau = [tokens_per_forward(reports(model, lambda _, one=one: one)) for one in (hydra, medusa)]
    assert tau[0] > tau[1] > 1


def test_a_layer_that_reads_the_targets_keys_drafts_as_well_late_in_a_text_and_better_than_heads(model):
    def tau(length):
        drafter = LongSpecDrafter(model.heads["longspec"].head, Chain(4))
        return tokens_per_forward(reports(model, lambda _: drafter, length))

    early, late = tau(64), tau(440)
    assert late > 0.9 * early
    assert early > tokens_per_forward(reports(model, lambda _: model.heads["hydra"], 64))


def test_a_tree_of_passes_gains_more_tokens_per_forward_than_its_first_pass(model):
    falcon = model.heads["falcon"]
    k = falcon.head.settings.k
    one = FalconDrafter(falcon.head, StaticTree.from_widths((4, *[1] * (k - 1))))
    found = [tokens_per_forward(reports(model, lambda _, by=by: by)) for by in (falcon, one)]
    assert found[0] > found[1] > 1
