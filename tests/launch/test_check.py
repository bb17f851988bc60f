"""`tiphys check` reports everything that is wrong with a recipe, before anything starts."""

import pytest

from tiphys.launch.check import check
from tiphys.pretrain.distributed.deepspeed_config import derive
from tiphys.pretrain.parallel import Grid, LayoutError
from tiphys.recipes.load import RecipeError, load_recipe

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
    text = "\n".join(found)
    assert len(found) == 5
    assert "modle: unknown key. Did you mean 'model'?" in text
    assert "deepspeed.train_batchsize: DeepSpeed has no such key. Did you mean 'train_batch_size'?" in text
    assert "deepspeed.zero_optimization.stge: DeepSpeed has no such key. Did you mean 'stage'?" in text
    assert "2 stages need deepspeed.zero_optimization.stage: 1, not 3" in text
    assert "no objective is called 'gatto'. Did you mean 'gato'?" in text


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["parallel.expert=2", "deepspeed.zero_optimization.stage=3"], 0, "stage: 1 or 2, not 3"),
        (["parallel.expert=3"], 0, "model.moe.experts (4) must be a positive multiple of parallel.expert (3)"),
        (["parallel.expert=2", "model.moe.experts=0"], 0, "model.moe.experts (0) must be a positive multiple"),
        (["parallel.pipeline=8"], 0, "4 layers cannot make 8 pipeline stages"),
        (["parallel.pipeline=2"], 3, "3 processes cannot be divided into 2 pipeline stages"),
        (["parallel.expert=4"], 2, "(2 processes ÷ 1 stages) cannot be divided into expert groups of 4"),
        (["deepspeed.train_batch_size=0"], 0, "a whole number, at least 1"),
        (["deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0"], 0, "loses precision"),
        (["deepspeed.bf16.enabled=true", "deepspeed.fp16.enabled=true"], 0, "use bf16"),
        (["deepspeed.optimizer.type=SGDD"], 0, "not supported"),
        (["deepspeed.scheduler.type=WarmupDecay"], 0, "Did you mean 'WarmupDecayLR'"),
        (["model.heads=5"], 0, "model.hidden (64) must be a multiple of 2 × model.heads (10)"),
        (["model.kv_heads=3"], 0, "model.heads (4) must be a multiple of model.kv_heads (3)"),
        (["model.moe.every=5"], 0, "5 is out of range; allowed: 1 to model.layers (4)"),
        (["model.head_size=9"], 0, "model.head_size: 9 is an odd number"),
        (["model.moe.first_dense=4"], 0, "model.moe.first_dense: 4 leaves no layer with experts; allowed: less than 4"),
        (["model.rope_theta=5", "model.rope.theta=6"], 0, "model.rope.theta: 6, but model.rope_theta is 5"),
        (["model.rope.type=llama3", "model.rope.low_frequency=4"], 0, "model.rope.low_frequency: 4 must be below"),
        (["model.layers=0"], 0, "model.layers: 0 is out of range; allowed: at least 1"),
        (["data.mixture[0].weight=-1"], 0, "data.mixture[0].weight: -1.0 is out of range; allowed: at least 0"),
        (["model.moe.experts_per_token=5"], 0, "5 is out of range; allowed: 1 to model.moe.experts (4)"),
        (
            ["deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.gradient_accumulation_steps=8"],
            2,
            "at least one whole micro-batch would be empty",
        ),
        (
            ["deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.gradient_accumulation_steps=2"],
            2,
            "hold only 2",
        ),
        (["deepspeed.gradient_accumulation_steps=5"], 2, "5 micro-batches are more than the 4 rows"),
        (["deepspeed.zero_optimization.stage=4"], 0, "4 is not allowed; allowed: 0, 1, 2 or 3"),
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
def test_what_cannot_run_is_an_error_with_the_reason(recipe, overrides, world, words):
    assert any(words in line for line in errors(recipe, *overrides, world=world))


@pytest.mark.parametrize(
    ("overrides", "world", "count"),
    [
        (["parallel.pipeline=2", "deepspeed.zero_optimization.stage=3", "deepspeed.gradient_allreduce_op=sum"], 4, 2),
        (["parallel.expert=2", "deepspeed.zero_optimization.stage=0", "deepspeed.bf16.enabled=true"], 4, 2),
        (["deepspeed.fp16.enabled=true", "deepspeed.optimizer.type=Lamb", "deepspeed.train_batch_size=0"], 1, 3),
        (["deepspeed.zero_optimization.stage=4"], 1, 1),
        (["deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.gradient_accumulation_steps=2"], 2, 1),
        (["deepspeed.gradient_accumulation_steps=5"], 2, 1),
        (["parallel.pipeline=2"], 3, 1),
        (["parallel.expert=4"], 2, 1),
    ],
)
def test_the_engine_raises_the_same_sentences_all_at_once(recipe, overrides, world, count):
    checked = {line.split(": ", 1)[1] for line in errors(recipe, *overrides, world=world)}
    loaded = load_recipe(recipe, overrides)
    with pytest.raises(LayoutError) as caught:
        derive(loaded, Grid(0, world, loaded.parallel.pipeline, loaded.parallel.expert))
    raised = str(caught.value).splitlines()
    assert len(raised) == count
    assert set(raised) == checked


def test_an_empty_mixture_is_an_error(recipe):
    assert any("data.mixture is empty" in line for line in errors(recipe, "data.mixture=[]"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{hiding: {blink: 1}}", "no scheme is called 'blink'"),
        ("{hiding: {bc: 0}}", "give the schemes with their shares"),
        ("{hiding: bc}", "give the schemes with their shares"),
        ("{query: past}", "no query is called 'past'"),
        ("{query: goal, hiding: {bc: 1}}", "'goal' would not be trained: the objective hides by bc"),
    ],
)
def test_a_query_that_would_not_be_trained_is_an_error(recipe, options, words):
    (error,) = errors(recipe, f"objectives.unimask={{options: {options}}}")
    assert "objectives.unimask.options" in error
    assert words in error
    (error,) = errors(recipe, f"objectives.bc={{options: {options}}}")
    assert "hides nothing" in error or "does not act by filling in" in error
