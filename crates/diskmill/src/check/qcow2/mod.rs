//! The check of qcow2 images.

mod copied;
mod rebuild;
mod refcounts;
mod references;
mod snapshots;

use diskmill_format::Limits;
use diskmill_format::qcow2::{Extensions, Geometry, Header, HeaderArea, L2Codec, RefcountWidth, feature};
use diskmill_io::Storage;

use super::counts::{Budget, Counts};
use super::disk::Disk;
use super::{CheckOptions, Finding, Repair, Report, Verdict};
use crate::error::{Error, Kind, Result};
use crate::reader::read_full;
use refcounts::RefcountTable;
use references::Patch;
use snapshots::NewTable;

/// Where the header has its incompatible and its autoclear feature bits (specification, "Header").
const INCOMPATIBLE_FIELD: u64 = 72;
const AUTOCLEAR_FIELD: u64 = 88;

/// As [`super::check_storage`].
pub(super) fn check(
    file: &dyn Storage,
    options: &CheckOptions,
    found: &mut dyn FnMut(Verdict, &Finding),
) -> Result<Report> {
    let CheckOptions { repair, limits, .. } = options;
    let mut first = match Pass::new(file, *repair, limits, found)?.run()? {
        Outcome::Done(report) => report,
        Outcome::Damaged(before) => {
            rebuild::rebuild(file, limits)?;
            match Pass::new(file, *repair, limits, found)?.run()? {
                Outcome::Done(after) => after.with_repaired(&before),
                Outcome::Damaged(_) => {
                    return Err(Error::new(Kind::Corrupt, "the rebuilt refcount structures are damaged too"));
                }
            }
        }
    };
    if first.corruptions_fixed > 0 || first.leaks_fixed > 0 {
        let Report { corruptions_fixed, leaks_fixed, leaks_kept, .. } = first;
        if let Outcome::Done(second) = Pass::new(file, Repair::Nothing, limits, found)?.run()? {
            first = Report { corruptions_fixed, leaks_fixed, leaks_kept, ..second };
        }
    }
    Ok(first)
}

/// How a [`Pass`] ended.
enum Outcome {
    Done(Report),
    /// The refcount structures must be rebuilt before anything else is repaired.
    Damaged(Report),
}

impl Report {
    /// The report of a repair that was made before this check, which found the rest.
    fn with_repaired(mut self, before: &Self) -> Self {
        self.corruptions_fixed +=
            before.corruptions_fixed + before.corruptions.saturating_sub(self.corruptions);
        self.leaks_fixed += before.leaks_fixed + before.leaks.saturating_sub(self.leaks);
        self
    }
}

/// One walk over an image.
struct Pass<'a> {
    disk: Disk<'a>,
    header: Header,
    extensions: Extensions,
    entries: L2Codec,
    limits: &'a Limits,
    repair: Repair,
    budget: Budget,
    /// References to each cluster.
    counts: Counts,
    /// Clusters past the end of the file that something refers to.
    beyond: Counts,
    table: RefcountTable,
    /// Whether something in the active state does not have the copied flag.
    uncopied: bool,
    /// Entries of L2 tables that are to be mended, once it is known that nothing else stands there.
    patches: Vec<Patch>,
    /// The snapshot table must be written anew.
    new_snapshots: Option<NewTable>,
    /// A table that may refer to clusters cannot be followed: what looks like a leak may be its.
    lost: bool,
    report: Report,
    found: &'a mut dyn FnMut(Verdict, &Finding),
}

impl<'a> Pass<'a> {
    fn new(
        file: &'a dyn Storage,
        repair: Repair,
        limits: &'a Limits,
        found: &'a mut dyn FnMut(Verdict, &Finding),
    ) -> Result<Self> {
        let mut start = vec![0; 512];
        let got = read_full(file, &mut start, 0)?;
        start.truncate(got);
        let mut header_limits = limits.clone();
        if repair == Repair::All {
            // A wrong number of them is mended.
            header_limits.qcow2_snapshots = u32::MAX;
        }
        let header = Header::parse(&start, &header_limits)?;
        let mut cluster = vec![0; header.geometry.cluster_size() as usize];
        let got = read_full(file, &mut cluster, 0)?;
        cluster.truncate(got);
        let HeaderArea { header, extensions, .. } = HeaderArea::parse(&cluster, &header_limits)?;
        let external = header.has(feature::DATA_FILE);
        Ok(Self {
            disk: Disk::new(file)?,
            entries: L2Codec::new(header.geometry, header.version, external),
            extensions,
            limits,
            repair,
            budget: Budget::new(limits.check_bytes),
            counts: Counts::default(),
            beyond: Counts::default(),
            table: RefcountTable::default(),
            uncopied: false,
            patches: Vec::new(),
            new_snapshots: None,
            lost: false,
            report: Report {
                total_clusters: header.size.div_ceil(header.geometry.cluster_size()),
                ..Report::default()
            },
            header,
            found,
        })
    }

    fn run(mut self) -> Result<Outcome> {
        self.check_features()?;
        self.count_references()?;
        self.count_refcount_structures()?;
        self.apply_patches()?;
        if self.report.corruptions_fixed > 0 {
            // Entries that were cleared must be durable before what they referred to is given free.
            self.disk.barrier()?;
        }
        let before = self.report.clone();
        let damaged = self.compare(Repair::Nothing)?;
        match self.repair {
            Repair::Nothing => {}
            Repair::Leaks if damaged => {
                return Err(Error::new(Kind::Corrupt, "the refcount structures must be rebuilt first")
                    .hint("-r all does that"));
            }
            Repair::All if damaged => return Ok(Outcome::Damaged(self.report)),
            repair => {
                if self.report.corruptions > 0 || self.report.leaks > 0 {
                    self.report = before;
                    self.compare(repair)?;
                    self.disk.barrier()?;
                }
            }
        }
        self.check_copied()?;
        self.write_snapshots()?;
        self.settle()
    }

    /// Looks for feature bits that exclude each other.
    fn check_features(&mut self) -> Result<()> {
        if self.external() || self.header.autoclear & feature::RAW_DATA_FILE == 0 {
            return Ok(());
        }
        let finding = Finding::RawWithoutDataFile;
        if self.repair == Repair::All {
            self.header.autoclear &= !feature::RAW_DATA_FILE;
            self.disk.write(&self.header.autoclear.to_be_bytes(), AUTOCLEAR_FIELD)?;
            self.repaired(&finding);
        } else {
            self.error(&finding, 1);
        }
        Ok(())
    }

    /// Ends a repair: an image without errors is clean.
    fn settle(self) -> Result<Outcome> {
        let Report { check_errors, corruptions, .. } = self.report;
        if self.repair != Repair::Nothing && check_errors == 0 && corruptions == 0 {
            self.disk.barrier()?;
            let bits = self.header.incompatible & !(feature::DIRTY | feature::CORRUPT);
            if bits != self.header.incompatible {
                self.disk.write(&bits.to_be_bytes(), INCOMPATIBLE_FIELD)?;
                self.disk.barrier()?;
            }
        }
        Ok(Outcome::Done(self.report))
    }

    /// Notes an error, found in `times` places that share it.
    fn error(&mut self, finding: &Finding, times: u64) {
        self.report.corruptions = self.report.corruptions.saturating_add(times);
        (self.found)(Verdict::Error, finding);
    }

    /// Notes an error that is repaired.
    fn repaired(&mut self, finding: &Finding) {
        self.report.corruptions_fixed += 1;
        (self.found)(Verdict::Repaired, finding);
    }

    fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    fn cluster_size(&self) -> u64 {
        self.header.geometry.cluster_size()
    }

    fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.header.geometry.cluster_bits()
    }

    fn width(&self) -> RefcountWidth {
        self.header.refcount_width
    }

    fn external(&self) -> bool {
        self.header.has(feature::DATA_FILE)
    }

    /// Clusters that the file has, and those past it that something refers to all the same.
    fn clusters(&self) -> u64 {
        let in_file = self.disk.len().div_ceil(self.cluster_size());
        self.counts.highest().map_or(in_file, |highest| in_file.max(highest + 1))
    }
}
