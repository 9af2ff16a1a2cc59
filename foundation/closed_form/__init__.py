"""What is solved rather than trained: the closed-form path, its mixture with the network, the noise that is left."""
