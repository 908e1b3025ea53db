"""Control of the precision during a run: schedule, guard, recovery, events."""
