"""Times beside a floor: the speed and the memory of decoding."""
