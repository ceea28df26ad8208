"""Process groups, launching, collectives, and the adapters to DeepSpeed and Megatron-core."""
