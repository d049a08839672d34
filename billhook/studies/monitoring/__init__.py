"""Rules over the runs of a store, and the steps of a lineage."""
