"""Where records come from: embedded scenes, folders, TFDS, ArrayRecord."""
