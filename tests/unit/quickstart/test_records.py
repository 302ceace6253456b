import json

from homefire.quickstart.records import RunLog, SupervisedRecord


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_headline_has_both_rewards_and_the_number_of_prompts(results):
    assert results(0.4125, 0.8504).headline == "held-out reward 0.412 -> 0.850 over 2 prompts"


def test_metrics_are_one_line_per_step_of_either_phase(tmp_path, results):
    log = RunLog(tmp_path / "out")

    log.supervised(SupervisedRecord(0, 5.5))
    log.step(results().steps[2])

    supervised, step = lines(tmp_path / "out" / "metrics.jsonl")
    assert supervised == {"phase": "supervised", "step": 0, "loss": 5.5}
    assert (step["phase"], step["step"]) == ("rl", 2)
    assert step["snapshot"]["identity"] == "step_00308-4b50536f"


def test_an_evaluation_is_kept_with_its_prompts_and_answers(tmp_path, results):
    log = RunLog(tmp_path)

    log.evaluation(results().before)

    (row,) = lines(tmp_path / "evaluations.jsonl")
    assert row["prompts"] == ["21", "543"]
    assert row["answers"] == ["12", "543"]
    assert row["snapshot"]["kind"] == "base"


def test_a_new_run_begins_its_files_anew(tmp_path):
    RunLog(tmp_path).supervised(SupervisedRecord(0, 5.5))

    RunLog(tmp_path)

    assert lines(tmp_path / "metrics.jsonl") == []


def test_what_the_server_keeps_of_a_step_is_all_numbers(results):
    metrics = results().steps[0].client_metrics()

    assert metrics["reward"] == 0.4
    assert all(isinstance(value, float) for value in metrics.values())
