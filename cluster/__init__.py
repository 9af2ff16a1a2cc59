"""Ray and DeepSpeed: the only place that knows them."""
