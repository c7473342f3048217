"""Tasks as lm-eval wants them described: the content of task.yaml."""

from typing import Any

from llmpress.data.tasks.files import TEST_FILE


def generation_config(name: str, *, pattern: str, max_new_tokens: int) -> dict[str, Any]:
    """Describe a task whose answer is written: greedily, to the end of the line.

    Args:
        name: Of the task.
        pattern: Regular expression with one group; its last match is compared with the answer.
        max_new_tokens: Generation stops there at the latest.
    """
    taken = {"function": "regex", "regex_pattern": pattern, "group_select": -1}
    return _config(
        name,
        "generate_until",
        ["exact_match"],
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": max_new_tokens},
        filter_list=[{"name": "answer", "filter": [taken, {"function": "take_first"}]}],
    )


def choice_config(name: str) -> dict[str, Any]:
    """Describe a task whose answer is the choice with the highest likelihood."""
    return _config(
        name, "multiple_choice", ["acc", "acc_norm"], doc_to_target="gold", doc_to_choice="choices"
    )


def _config(name: str, output_type: str, metrics: list[str], **settings: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": TEST_FILE}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "{{query}}",
        **settings,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }
