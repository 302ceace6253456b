"""Recipes of tinker-cookbook as they come, on data that it packages or makes itself.

python cookbook.py MODEL_DIRECTORY LOGS
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import tinker
import tinker_cookbook
from findings import Findings
from tinker_cookbook import renderers
from tinker_cookbook.recipes.math_rl import arithmetic_env
from tinker_cookbook.recipes.math_rl import train as math_rl
from tinker_cookbook.recipes.multiplayer_rl.guess_number import train as guess_number
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

MODEL, LOGS = sys.argv[1], Path(sys.argv[2])
RENDERER = "role_colon"
EXAMPLES = Path(tinker_cookbook.__file__).parent / "example_data/conversations.jsonl"
GROUPS, STEPS = 4, 2
found = Findings()


def metrics(log_path: Path) -> list[dict]:
    return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]


def checkpoints(log_path: Path) -> list[dict]:
    return [json.loads(line) for line in (log_path / "checkpoints.jsonl").read_text().splitlines()]


@found.step
def supervised():
    log_path = LOGS / "supervised"
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=400,
        batch_size=16,
        train_on_what=TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    )
    config = supervised_train.Config(
        log_path=str(log_path),
        model_name=MODEL,
        recipe_name="recipe_sl_basic",
        renderer_name=RENDERER,
        dataset_builder=FromConversationFileBuilder(common_config=common, file_path=str(EXAMPLES)),
        learning_rate=5e-3,
        lora_rank=8,
        max_steps=6,
    )
    asyncio.run(supervised_train.main(config))
    return {"metrics": metrics(log_path), "checkpoints": checkpoints(log_path)}


def worked_problems() -> list[tinker.Datum]:
    """The recipe's first problems with their answers, as the renderer would have them sampled."""
    tokenizer = get_tokenizer(MODEL)
    renderer = renderers.get_renderer(RENDERER, tokenizer=tokenizer)
    (stop,) = renderer.get_stop_sequences()
    dataset = arithmetic_env.ArithmeticDataset(GROUPS, renderer, group_size=1)
    problems = [group.env_thunk() for step in range(STEPS) for group in dataset.get_batch(step)]
    return [worked(problem, renderer, tokenizer, stop) for problem in problems]


def worked(problem, renderer, tokenizer, stop: str) -> tinker.Datum:
    question = {"role": "user", "content": problem.get_question()}
    prompt = renderer.build_generation_prompt([*(problem.convo_prefix or []), question]).to_ints()
    text = f" {problem.get_reference_answer()}{stop}"
    answer = tokenizer.encode(text, add_special_tokens=False)
    row = [*prompt, *answer]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": row[1:], "weights": weights},
    )


def taught_arithmetic() -> str:
    """A state that is rewarded now and then: without, no group has a gradient."""
    data = worked_problems()
    service = tinker.ServiceClient()
    client = service.create_lora_training_client(MODEL, rank=8).result()
    for _ in range(60):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=5e-3)).result()
    state = client.save_state("taught").result().path
    service.close("success").result()
    return state


@found.step
def arithmetic():
    log_path = LOGS / "arithmetic"
    state = taught_arithmetic()
    config = math_rl.CLIConfig(
        env="arithmetic",
        model_name=MODEL,
        renderer_name=RENDERER,
        load_checkpoint_path=state,
        lora_rank=8,
        group_size=8,
        groups_per_batch=GROUPS,
        learning_rate=1e-3,
        max_tokens=16,
        loss_fn="importance_sampling",
        max_steps=STEPS,
        save_every=1,
        log_path=str(log_path),
        behavior_if_log_dir_exists="delete",
    )
    asyncio.run(math_rl.cli_main(config))
    return {
        "taught": state,
        "metrics": metrics(log_path),
        "checkpoints": checkpoints(log_path),
    }


@found.step
def stable_reinforce():
    """The recipe's default loss."""
    config = math_rl.CLIConfig(
        model_name=MODEL,
        renderer_name=RENDERER,
        group_size=2,
        groups_per_batch=2,
        max_steps=1,
        log_path=str(LOGS / "stable_reinforce"),
        behavior_if_log_dir_exists="delete",
    )
    asyncio.run(math_rl.cli_main(config))


@found.step
def guess_the_number():
    log_path = LOGS / "guess_number"
    config = guess_number.build_config(
        guess_number.CLIConfig(
            model_name=MODEL,
            renderer_name=RENDERER,
            group_size=2,
            batch_size=2,
            learning_rate=1e-3,
            max_tokens=4,
            max_steps=1,
            eval_every=0,
            log_path=str(log_path),
            behavior_if_log_dir_exists="delete",
        )
    )
    asyncio.run(rl_train.main(config))
    return {"metrics": metrics(log_path), "checkpoints": checkpoints(log_path)}


found.report()
