"""The model card of a policy: README.md, with metadata for hubs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tiphys.dataio.messages import counted, printable
from tiphys.recipes.target_return import TargetReturn

_ACTING = """```python
{imports}
from transformers import AutoModel

policy = AutoModel.from_pretrained("{place}", trust_remote_code=True).policy({task})
env = {make}({environment})
observation, _ = env.reset(seed=0)
{before}done = False
while not done:
    observation, reward, terminated, truncated, _ = env.step(policy.act(observation{rewards}))
    done = terminated or truncated
```"""
_PLACE = "folder, or owner/name on a hub"
# What to import so that gymnasium knows a family's ids. It does not know those of Meta-World; Tiphys makes these.
_REGISTERS = {"BabyAI": ", minigrid", "MiniGrid": ", minigrid", "ALE/": ", ale_py"}


def model_card(config: Mapping[str, Any], processor: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """Text of README.md: YAML metadata (license, library, tags, model-index), how to act, results, tasks.

    config, processor   contents of config.json and processor.json
    evaluation          contents of evaluation.json, or None
    """
    from huggingface_hub import EvalResult, ModelCardData

    about = config.get("tiphys", {})
    name = about.get("name") or "tiphys-policy"
    results = (evaluation or {}).get("tasks", {})
    data = ModelCardData(
        model_name=name,
        license=about.get("license") or None,
        library_name="transformers",
        pipeline_tag="reinforcement-learning",
        tags=["tiphys", "decision-model", "offline-reinforcement-learning", "imitation-learning"],
        eval_results=[EvalResult(**r) for task, found in results.items() for r in _metrics(task, found)] or None,
    )
    tasks = list(processor["tasks"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(name)}",
        _what(config, processor),
        "## Acting",
        _example(tasks, processor),
    ]
    if results:
        parts += ["## Results", *_table(results)]
    known = ", ".join(_code(t["name"]) for t in tasks[:50]) + (
        f" and {len(tasks) - 50} more" if len(tasks) > 50 else ""
    )
    parts += ["## Tasks", known]
    if about.get("recipe"):
        average = " Its weights are a moving average over the steps." if about.get("weights") == "average" else ""
        parts.append(
            f"Trained for {counted(about.get('step', 0), 'step')} with `recipe.yaml` (hash `{about['recipe']}`).{average}"
        )
    return "\n\n".join(parts) + "\n"


def _what(config: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
    experts = config.get("num_experts") or 0
    kind = f"a mixture of {experts} experts, {config['num_experts_per_tok']} for each token" if experts else "dense"
    return (
        f"A Transformer with {config['num_hidden_layers']} layers of width {config['hidden_size']} ({kind}), trained "
        f"with Tiphys {_paradigms(processor)}on offline trajectories of {counted(len(processor['tasks']), 'task')}. "
        "It needs `torch`, `transformers` and the environments in which it acts."
    )


def _paradigms(processor: Mapping[str, Any]) -> str:
    """By which paradigms it learned, as the table of paradigms names them."""
    found = sorted({str(o["paradigm"]) for o in processor.get("objectives", {}).values() if o.get("paradigm")})
    return f"by the paradigm{'s' if len(found) > 1 else ''} {', '.join(f'`{p}`' for p in found)} " if found else ""


def _example(tasks: list[Mapping[str, Any]], processor: Mapping[str, Any]) -> str:
    acting = [t for t in tasks if t.get("environment")]
    task = min(acting, key=lambda t: t["environment"].startswith("metaworld/"), default=None)
    if task is None:
        text = "None of its tasks has an environment. `policy.act(observation)` takes observations as in the training data."
        asking = next((t for t in tasks if _asks_for_returns(processor, t["name"])), None)
        return text if asking is None else f"{text}\n\n{_returns(processor, asking['name'])}"
    environment = task["environment"]
    registers = next((more for prefix, more in _REGISTERS.items() if environment.startswith(prefix)), "")
    imports, make = f"import gymnasium{registers}", "gymnasium.make"
    if environment.startswith("metaworld/"):
        imports, make = "from tiphys.dataio import environments", "environments.make"
    asks = _asks_for_returns(processor, task["name"])
    text = _ACTING.format(
        imports=imports,
        make=make,
        place=_PLACE,
        task=_literal(task["name"]),
        environment=_literal(environment),
        before="reward = None\n" if asks else "",
        rewards=", rewards=reward" if asks else "",
    )
    return f"{text}\n\n{_returns(processor, task['name'])}" if asks else text


def _literal(text: str) -> str:
    """A name from data as a Python literal, on one line. It cannot end the block of code that it stands in."""
    return json.dumps(text).replace("`", "\\u0060")


def _plain(text: str) -> str:
    """A name from data as text in Markdown, also in a table."""
    return printable(text, "").replace("<", "&lt;").replace("`", "'").replace("|", "\\|")


def _code(text: str) -> str:
    """A name from data as code in Markdown."""
    return "`" + printable(text, "").replace("`", "'") + "`"


def _asks_for_returns(processor: Mapping[str, Any], task: str) -> bool:
    """Whether the objective that a policy acts with by default in a task is conditioned on returns."""
    mine = (o["timesteps"][task] for o in processor["objectives"].values() if task in o["timesteps"])
    return any(element["role"] == "return" for element in next(mine, {"elements": ()})["elements"])


def _returns(processor: Mapping[str, Any], task: str) -> str:
    objective = next(o for o in processor["objectives"].values() if task in o["timesteps"])
    stated, quantiles = objective["target_return"], processor.get("return_quantiles", {}).get(task, ())
    target = TargetReturn.parse(stated if isinstance(stated, str) else f"{stated}x")
    asked = target.of(processor["best_return"][task], quantiles)
    return (
        "The policy asks for a return. Give `act` the rewards of the last actions (`rewards=`): they lower the return that is "
        f"still asked for. {_code(f'policy.reset({_literal(task)}, target_return=…)')} chooses the return of an episode, in "
        f"rewards; without it, {asked:.4g} is asked for."
    )


def _metrics(task: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of the model-index for one task."""
    deviation = found.get("std_return")
    mean = f"{found['mean_return']:.2f}" + (f" +/- {deviation:.2f}" if deviation is not None else "")
    rows = [("mean_reward", "mean return", mean)]
    if found.get("success_rate") is not None:
        rows.append(("success_rate", "success rate", round(found["success_rate"], 4)))
    if found.get("expert_normalized") is not None:
        rows.append(("expert_normalized_score", "expert-normalised score", round(found["expert_normalized"], 4)))
    where = {"task_type": "reinforcement-learning", "dataset_type": task, "dataset_name": task}
    return [{**where, "metric_type": kind, "metric_name": label, "metric_value": value} for kind, label, value in rows]


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| task | episodes | mean return | success | random | expert | expert-normalised |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, r in results.items():
        low, high = r.get("expert_normalized_interval") or (None, None)
        normalized = _number(r.get("expert_normalized"))
        if low is not None and high is not None:
            normalized += f" ({_number(low)} … {_number(high)})"
        cells = [_number(r[k]) for k in ("mean_return", "success_rate", "random", "expert")]
        lines.append(f"| {_plain(task)} | {r['episodes']} | {' | '.join(cells)} | {normalized} |")
    note = (
        "Random and expert: scores measured when the training data was collected (success rate if the task has one, "
        "otherwise return). In brackets: 95 % confidence intervals over the episodes."
    )
    return ["\n".join(lines), note]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
