"""What runs and studies find, as frozen values with one JSON form."""
