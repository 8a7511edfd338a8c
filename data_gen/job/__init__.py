"""The job of a dataset: its plan, its workers, the engines that start them, and how far they are."""
