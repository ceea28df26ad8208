"""Process groups, collectives, tensor-parallel layers, and the adapters to DeepSpeed and Megatron-core."""
