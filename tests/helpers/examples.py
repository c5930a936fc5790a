"""The pages of the examples."""

# The page in docs/guides/ of each file of examples/.
PAGES = {
    "custom_reward": "add-a-reward.md",
    "custom_loss": "add-a-loss.md",
    "custom_positions": "add-a-position-choice.md",
    "custom_source": "add-a-source.md",
}
