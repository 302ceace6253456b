"""Tasks of our own, evaluated by `lm-eval` over `local-completions` with token ids.

python lm_eval_tasks.py DEPLOYMENT TOKENIZER_DIRECTORY DOCUMENTS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets
import lm_eval
from findings import Findings
from lm_eval.tasks import TaskManager

DEPLOYMENT, TOKENIZER, DOCUMENTS = sys.argv[1:]
documents = json.loads(Path(DOCUMENTS).read_text())
found = Findings()


def dataset(name: str):
    return lambda **_: {"test": datasets.Dataset.from_list(documents[name])}


CHOICES = {
    "task": "bytes_choices",
    "custom_dataset": dataset("choices"),
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "task": "bytes_texts",
    "custom_dataset": dataset("texts"),
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
CONTINUED = {
    "task": "bytes_continued",
    "custom_dataset": dataset("continued"),
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{said}}",
    "generation_kwargs": {"until": documents["until"], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ONLY_THESE = TaskManager(include_defaults=False)
"""The packaged tasks would take longer to list than these to evaluate."""


def evaluate(**options: object) -> dict[str, object]:
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": DEPLOYMENT,
            "base_url": f"{os.environ['OPENAI_BASE_URL']}/completions",
            "tokenizer": TOKENIZER,
            "tokenizer_backend": "huggingface",
            "max_length": 512,
            "max_retries": 1,
            **options,
        },
        tasks=[CHOICES, TEXTS, CONTINUED],
        task_manager=ONLY_THESE,
        bootstrap_iters=0,
    )
    return {
        "scores": {
            task: {name: value for name, value in scores.items() if isinstance(value, float)}
            for task, scores in results["results"].items()
        },
        "answers": {
            task: [
                [sample["arguments"], sample["resps"]]
                for sample in sorted(samples, key=lambda sample: sample["doc_id"])
            ]
            for task, samples in results["samples"].items()
        },
    }


@found.step
def one_by_one():
    return evaluate()


@found.step
def in_batches_at_once():
    return evaluate(batch_size=3, num_concurrent=2)


found.report()
