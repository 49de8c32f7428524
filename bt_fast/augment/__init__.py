"""Random augmentation of whole minibatches on their own device: AugMix and its nine operations."""
