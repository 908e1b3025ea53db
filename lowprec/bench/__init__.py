"""What the parts cost, measured: medians with their spread, the floor beside them, rivals in the
same run."""
