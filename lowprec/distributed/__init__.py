"""Several processes: sharding by FSDP2, and what ranks have to agree on."""
