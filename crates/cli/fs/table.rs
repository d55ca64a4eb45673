//! Tables for people: columns as wide as their widest cell.

/// Rows of cells. Columns whose title begins with `>` are aligned to the right.
pub(crate) struct Table {
    titles: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(titles: &'static [&'static str]) -> Self {
        Self { titles, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table with its titles, each line ended. Columns without any content are left out.
    pub(crate) fn text(&self) -> String {
        let columns: Vec<Column> = self
            .titles
            .iter()
            .enumerate()
            .filter_map(|(index, title)| {
                let widest = self.rows.iter().filter_map(|row| row.get(index)).map(|cell| width(cell)).max();
                let right = title.starts_with('>');
                let title = title.trim_start_matches('>');
                let width = widest.filter(|&widest| widest > 0)?.max(width(title));
                Some(Column { index, title, width, right })
            })
            .collect();
        let mut out = String::new();
        put_line(&mut out, &columns, |column| column.title);
        for row in &self.rows {
            put_line(&mut out, &columns, |column| row.get(column.index).map_or("", String::as_str));
        }
        out
    }
}

struct Column {
    index: usize,
    title: &'static str,
    width: usize,
    right: bool,
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn put_line<'t>(out: &mut String, columns: &[Column], cell: impl Fn(&Column) -> &'t str) {
    let mut line = String::new();
    for column in columns {
        let text = cell(column);
        let pad = " ".repeat(column.width.saturating_sub(width(text)));
        let [before, behind] = if column.right { [pad.as_str(), ""] } else { ["", pad.as_str()] };
        line.extend([before, text, behind, "  "]);
    }
    out.push_str(line.trim_end());
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let mut table = Table::new(&["NAME", "EMPTY", ">SIZE", "FS"]);
        table.row(["/dev/sda".into(), String::new(), "10 MiB".into(), String::new()]);
        table.row(["  ü".into(), String::new(), "1 B".into(), "ext4".into()]);
        let want = "NAME        SIZE  FS\n/dev/sda  10 MiB\n  ü          1 B  ext4\n";
        assert_eq!(table.text(), want);
    }
}
