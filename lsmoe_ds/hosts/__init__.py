"""Models of transformers as hosts of methods: their linear layers are sites."""
