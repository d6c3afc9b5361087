"""How much each head, neuron, channel and layer matters, measured by forward passes of the sharded model."""
