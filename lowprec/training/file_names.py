"""Names of the files that a run writes into its directory. `run/directory.py` says what each of
them holds."""

CONFIG = "config.yaml"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SUMMARY = "summary.json"
MODEL = "model"
