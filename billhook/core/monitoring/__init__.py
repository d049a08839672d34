"""What is watched: bounds that hold over many looks, rules, and the alerts that they raise."""
