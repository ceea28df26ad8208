"""Neuron Specialization: each direction trains and uses the hidden units that it activates."""
