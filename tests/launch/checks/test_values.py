"""What DeepSpeed, torch or the trainer would refuse, or read as something else, is an error of `tiphys check` at its key."""

import pytest

from tiphys.launch.check import check
from tiphys.recipes.load import RecipeError

GOOD = """
name: small
data: {{mixture: [{{dataset: a, objective: gato}}]}}
model: {{layers: 4, hidden: 64, heads: 4}}
deepspeed:
  train_batch_size: 8
  optimizer: {{type: AdamW, params: {{lr: 1e-4}}}}
  zero_optimization: {{stage: 1}}
{more}
run: {{dir: runs/small}}
"""


@pytest.fixture
def errors(tmp_path):
    def find(*overrides, more=""):
        file = tmp_path / "recipe.yaml"
        file.write_text(GOOD.format(more=more))
        try:
            check(file, overrides, data=False)
        except RecipeError as error:
            return [line.split("recipe.yaml", 1)[-1] for line in error.errors]
        return []

    return find


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.params.lr='1e-3'", "must be a number, not the text '1e-3'; write it without quotes"),
        ("optimizer.params.lr=fast", "must be a number, not the text 'fast'"),
        ("optimizer.params.lr=-1e-3", "-0.001 is out of range; allowed: at least 0, at most 10"),
        ("optimizer.params.lr=.nan", "must be a number, not nan"),
        ("optimizer.params.lr=true", "must be a number, not True"),
        ("optimizer.params.learning_rate=1e-3", "AdamW: DeepSpeed has no such key. Did you mean 'lr'?"),
        ("optimizer.params.momentum=0.9", "AdamW: DeepSpeed has no such key"),
        ("optimizer.params.weight_dekay=0.1", "Did you mean 'weight_decay'?"),
        ("optimizer.params.weight_decay=-0.1", "out of range"),
        ("optimizer.params.betas=[0.9,1.0]", "1.0 is out of range; allowed: at least 0, below 1"),
        ("optimizer.params.betas=0.9", "must be a list of two numbers"),
        ("optimizer.params.betas=[0.9]", "must be a list of two numbers"),
        ("optimizer.params.betas=['0.9',0.99]", "must be a number, not the text '0.9'"),
        ("optimizer.params.eps=0", "allowed: above 0"),
        ("optimizer.params.amsgrad=true", "a checkpoint does not hold its state"),
        ("optimizer.params.maximize=true", "the loss would be maximised"),
        ("optimizer.params.max_grad_norm=1", "write deepspeed.gradient_clipping"),
        ("optimizer.params=3", "must be a section with keys, not 3"),
        ("optimizer.parms={lr: 1}", "Did you mean 'params'?"),
        ("gradient_clipping='1.0'", "must be a number, not the text '1.0'; write it without quotes"),
        ("gradient_clipping=-1", "out of range; allowed: at least 0"),
        ("learning_rate=1e-3", "write deepspeed.optimizer.params.lr"),
        ("max_grad_norm=1", "Did you mean 'gradient_clipping'?"),
        ("train_batch_size=auto", "cannot be auto: it is the number of rows of a global batch"),
        ("train_batch_size='8'", "'8' is not allowed; allowed: a whole number"),
        ("train_batch_size=10000000000", "allowed: a whole number, at least 1, at most"),
        ("train_micro_batch_size_per_gpu=0", "0 is not allowed"),
        ("gradient_accumulation_steps=1.5", "1.5 is not allowed"),
        ("steps_per_print=0", "0 is out of range; allowed: at least 1"),
        ("communication_data_type=fp8", "'fp8' is not allowed; allowed: fp32, fp16, bf16"),
        ("prescale_gradients=1", "must be true or false, not 1"),
        ("fp16={enabled: true}", "is not supported"),
        ("fp16=true", "must be a section with keys, not True"),
        ("bf16=auto", "must be a section with keys, not 'auto'; write {enabled: auto}"),
        ("bf16.enabled='true'", "must be true or false, not the text 'true'; write it without quotes"),
        ("bf16.enable=true", "Did you mean 'enabled'?"),
        ("bf16={enabled: true, bf16_master_weights_and_grads: true}", "a checkpoint holds fp32 master weights"),
        ("zero_optimization.legacy_stage1=true", "no old stage 1 any more"),
        ("zero_optimization=2", "must be a section with keys, not 2"),
        ("zero_optimization.stage='2'", "'2' is not allowed"),
        ("zero_optimization.stage=true", "True is not allowed"),
        ("zero_optimization.reduce_bucket_size='5e8'", "must be a whole number, not the text '5e8'"),
        ("zero_optimization.reduce_bucket_size=-1", "greater than 0"),
        ("zero_optimization.allgather_bucket_size=7", "an even number"),
        ("zero_optimization.offload_optimizer.devise=cpu", "Did you mean 'device'?"),
        ("zero_optimization.offload_optimizer.device=gpu", "'gpu'"),
        ("zero_optimization.offload_optimizer=cpu", "must be a section with keys, not 'cpu'"),
        ("scheduler=WarmupLR", "must be a section with keys, not 'WarmupLR'"),
        ("scheduler={type: WarmupLR, params: {warmup_steps: 10}}", "Did you mean 'warmup_num_steps'?"),
        ("scheduler={type: WarmupLR, params: {warmup_num_steps: 0}}", "0 is out of range"),
        ("scheduler={type: WarmupLR, params: {warmup_num_steps: 1e2}}", "must be a whole number, not 100.0; write 100"),
        ("scheduler={type: WarmupLR, params: {warmup_type: cosine}}", "allowed: log, linear"),
        (
            "scheduler={type: WarmupDecayLR}",
            "is missing: WarmupDecayLR needs it; write for example total_num_steps: auto",
        ),
        (
            "scheduler={type: OneCycle, params: {cycle_min_lr: 1, cycle_max_lr: 0.1}}",
            "cycle_min_lr (1) is above cycle_max_lr",
        ),
        ("aio={}", "has no use here: nothing is kept on NVMe"),
        ("checkpoint={tag_validation: Warn}", "use the section `checkpoint` of the recipe"),
        ("sparse_attention={}", "this version of DeepSpeed has removed it"),
        ("comet={api_key: abc}", "set COMET_API_KEY in the environment instead"),
        ("wandb={enabled: true}", "needs the package wandb"),
        ("tensorboard={output_path: ~/tb}", "DeepSpeed does not know `~`"),
        ("activation_checkpointing={partition_activation: true}", "Did you mean 'partition_activations'?"),
    ],
)
def test_a_wrong_value_of_deepspeed_is_one_error_at_its_key(errors, override, words):
    found = errors(f"deepspeed.{override}")
    assert len(found) == 1, found
    assert words in found[0]
    assert f": deepspeed.{override.partition('=')[0].partition('.')[0]}" in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed.optimizer.params={lr: auto, betas: [0, 0.99], eps: 1e-8, weight_decay: 0, torch_adam: true}"],
        ["deepspeed.gradient_clipping=auto", "deepspeed.bf16={enabled: auto}", "deepspeed.fp16={enabled: false}"],
        ["deepspeed.zero_optimization={stage: 2, reduce_bucket_size: 5e8, offload_optimizer: {device: cpu}}"],
        [
            "deepspeed.scheduler={type: WarmupDecayLR, params: {total_num_steps: auto, warmup_max_lr: auto, warmup_num_steps: 9}}"
        ],
        ["deepspeed.scheduler={type: WarmupCosineLR, params: {total_num_steps: 5000}}"],
        [
            "deepspeed.flops_profiler={enabled: false}",
            "deepspeed.wall_clock_breakdown=on",
            "deepspeed.steps_per_print=10",
        ],
    ],
)
def test_what_deepspeed_takes_passes(errors, overrides):
    assert errors(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layers=10000000"], "model.layers: 10000000 is out of range; allowed: at least 1, at most 4096"),
        (["model.hidden=1000000000"], "model.hidden: 1000000000 is out of range"),
        (["model.moe.experts=1000000"], "model.moe.experts: 1000000 is out of range"),
        (["objectives.gato.context=1000000000"], "objectives.gato.context: 1000000000 is out of range"),
        (["model.layers=4096", "model.hidden=131072", "model.heads=1024"], "parameters; allowed: at most 1e+13"),
        (["model.text_vocabulary=10000000000"], "model.text_vocabulary: 10000000000 is out of range"),
        (["objectives.gato.context=16777216", "deepspeed.train_batch_size=4194304"], "allowed: at most 2^34"),
        (["data.mixture[0].weight=.nan"], "data.mixture[0].weight: nan is out of range"),
        (["data.mixture[0].weight=1e300"], "data.mixture[0].weight: 1e+300 is out of range"),
        (["train.steps=99999999999999999999999"], "train.steps"),
        (["model.text_tokenizer=nowhere/tokenizer.json"], "nowhere/tokenizer.json cannot be read: No such file"),
        (["model.text_tokenizer=nowhere/x.model"], "nowhere/x.model cannot be read: No such file"),
        (["model.text_tokenizer=."], ". is a folder, so it is not read"),
        (["model.text_tokenizer=recipe.yaml"], "is not a valid tokenizer"),
    ],
)
def test_numbers_and_files_that_no_run_can_use(errors, overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = errors(*overrides)
    assert any(words in line for line in found), found


def test_every_error_is_reported_at_once_with_its_line(errors):
    found = errors(
        "train.steps=0",
        more="  gradient_clipping: '1.0'\n  scheduler: {type: WarmupLR, params: {warmup_num_steps: 0}}\n  fp16: true\n",
    )
    assert {tuple(line.split(": ")[:2]) for line in found} == {
        (":9", "deepspeed.gradient_clipping"),
        (":10", "deepspeed.scheduler.params.warmup_num_steps"),
        (":11", "deepspeed.fp16"),
        ("override 'train.steps=0'", "train.steps"),
    }
