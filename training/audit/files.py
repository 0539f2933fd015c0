"""Names of what an audit writes into its folder."""

HTML_FILE, JSON_FILE, PICTURE_FOLDER = "audit.html", "audit.json", "pictures"
REPORT_ENTRIES = (HTML_FILE, JSON_FILE, PICTURE_FOLDER)
