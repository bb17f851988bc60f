"""`tiphys check` names all that is wrong, before anything starts."""

import pytest

from tiphys.launch.check import check
from tiphys.recipes.load import RecipeError

GOOD = """
name: small
data: {mixture: [{dataset: a, objective: gato}]}
model: {layers: 4, hidden: 64, heads: 4, moe: {experts: 4}}
deepspeed:
  train_batch_size: 8
  zero_optimization: {stage: 1}
  optimizer: {type: AdamW, params: {lr: 1e-4}}
run: {dir: runs/small}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


def errors(recipe, *overrides, world=0):
    with pytest.raises(RecipeError) as caught:
        check(recipe, overrides, world=world, data=False)
    return caught.value.errors


def test_a_good_recipe_passes(recipe):
    assert check(recipe, data=False, world=4).name == "small"
    assert check(recipe, ["parallel.pipeline=2", "parallel.expert=2"], world=4, data=False).parallel.expert == 2


def test_five_errors_are_five_lines(recipe):
    found = errors(
        recipe,
        "modle.layers=2",
        "deepspeed.train_batchsize=8",
        "deepspeed.zero_optimization.stge=1",
        "parallel.pipeline=2",
        "deepspeed.zero_optimization.stage=3",
        "data.mixture[0].objective=gatto",
    )
    said = "\n".join(found)
    assert len(found) == 5
    assert "modle: unknown key. Did you mean 'model'?" in said
    assert "deepspeed.train_batchsize: DeepSpeed has no such key. Did you mean 'train_batch_size'?" in said
    assert "deepspeed.zero_optimization.stge: DeepSpeed has no such key. Did you mean 'stage'?" in said
    assert "2 stages need deepspeed.zero_optimization.stage: 1, not 3" in said
    assert "no objective is called 'gatto'. Did you mean 'gato'?" in said


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["parallel.expert=2", "deepspeed.zero_optimization.stage=3"], 0, "stage: 1 or 2, not 3"),
        (["parallel.expert=3"], 0, "model.moe.experts (4) must be a positive multiple of parallel.expert (3)"),
        (["parallel.pipeline=8"], 0, "4 layers cannot make 8 pipeline stages"),
        (["parallel.pipeline=2"], 3, "3 processes cannot be divided into 2 pipeline stages"),
        (["parallel.expert=4"], 2, "(2 processes ÷ 1 stages) cannot be divided into expert groups of 4"),
        (["deepspeed.train_batch_size=0"], 0, "a whole number, at least 1"),
        (["deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0"], 0, "loses precision"),
        (["deepspeed.bf16.enabled=true", "deepspeed.fp16.enabled=true"], 0, "use bf16"),
        (["deepspeed.optimizer.type=SGDD"], 0, "not supported"),
        (["deepspeed.scheduler.type=WarmupDecay"], 0, "Did you mean 'WarmupDecayLR'"),
        (["model.heads=5"], 0, "model.hidden (64) must be a multiple of 2 × model.heads (10)"),
        (["model.moe.experts_per_token=5"], 0, "5 is out of range; allowed: 1 to model.moe.experts (4)"),
        (
            ["deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.gradient_accumulation_steps=8"],
            2,
            "at least one whole micro-batch would be empty",
        ),
        (["objectives.mine.context=8"], 0, "no paradigm is called 'mine'"),
        (["deepspeed.zero_optimization.offload_param.device=cpu"], 0, "DeepSpeed ignores it at stage 1"),
        (
            ["deepspeed.zero_optimization.offload_optimizer.device=nvme"],
            0,
            "'nvme': a checkpoint reads state only from memory",
        ),
        (["deepspeed.zero_optimization.zero_quantized_gradients=true"], 0, "would depend on the layout"),
        (["deepspeed.zero_optimization.zero_hpz_partition_size=2"], 0, "second copy of the weights"),
        (["deepspeed.gradient_allreduce_op=sum"], 0, "the loss is scaled for a mean"),
        (["deepspeed.managed_gradient_accumulation=false"], 0, "division by the accumulation steps"),
        (["deepspeed.tensor_parallel.autotp_size=2"], 2, "the tensors of a layer are not divided"),
        (["deepspeed.use_data_before_expert_parallelism=true"], 0, "neighbouring processes"),
        (["deepspeed.torch_autocast.enabled=true"], 0, "the router and the loss in half precision"),
        (["deepspeed.elasticity.enabled=true"], 0, "would change train_batch_size"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(recipe, overrides, world, words):
    assert any(words in line for line in errors(recipe, *overrides, world=world))


def test_an_empty_mixture_is_refused(recipe):
    assert any("data.mixture is empty" in line for line in errors(recipe, "data.mixture=[]"))
