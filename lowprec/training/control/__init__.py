"""The precision of a run while it trains: schedule, guard, snapshots, events."""
