"""From a source's name to a training batch: source → prompt → tokens → record → pack → batch."""
