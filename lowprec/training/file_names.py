"""Names of the files that a run writes into its directory. `run/directory.py` says what each of
them holds."""

CONFIG = "config.yaml"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SUMMARY = "summary.json"
MODEL = "model"

UNFINISHED_SUMMARY = ".summary.json"
"""The summary of a run that is about to finish: its model/ is not complete yet."""
END_OF_TRAINING = "train_runtime"
"""Key of the line of metrics.jsonl that the Trainer logs after its last step."""
