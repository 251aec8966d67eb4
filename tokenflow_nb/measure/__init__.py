"How good an edit is: optical flow, metrics, a report and its page; and how to take flicker out."
