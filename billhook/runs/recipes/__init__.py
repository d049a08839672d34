"""The recipes that come with Billhook, a YAML file each."""
