"""Training in several processes: sharding by FSDP2, and decisions that all ranks share."""
