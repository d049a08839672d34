"""The measuring engine: losses of many plans at once, as cheaply as they can be had."""
